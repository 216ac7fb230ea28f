"""PyTorch's default dtype and device: they affect new parameters only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tests.positions.absolutes import step_of
from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, GroupQueryAttention, MultiHeadAttention
from transformer.blocks import FeedForward, GatedFeedForward, LayerNorm, RMSNorm
from transformer.kernels import Kernel, Sinks, tuned
from transformer.kernels.biases import as_bias
from transformer.positions import ALiBi, RelativePositionBias, RotaryEmbedding, SinusoidalPositions


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    **{
        str(dtype): lambda dtype=dtype: default_dtype(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)
    },
    "meta": lambda: torch.device("meta"),
}


@pytest.fixture(params=DEFAULTS)
def default(request: pytest.FixtureRequest) -> Callable:
    return DEFAULTS[request.param]


def made(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu").to(dtype)


def tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)] if isinstance(result, (tuple, list)) else []


def same(default: Callable, call: Callable[..., object], *arguments: object, **options: object) -> None:
    """Equal bits, dtypes and devices under a default."""
    expected = tensors(call(*arguments, **options))
    with default():
        found = tensors(call(*arguments, **options))
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_kernels(dtype: torch.dtype, softcap: float | None, grad: bool, default: Callable) -> None:
    """Over few keys, and over so many that products work a few heads at a time."""
    kernel = Kernel(0.3, softcap)
    for keys in (5, 3000):
        query, key = made(dtype, 2, 4, 3, 8), made(dtype, 2, 2, keys, 8)
        sinks = Sinks(query, key[:, :, :2], key[:, :, :2], None)
        seen = torch.ones(3, keys, dtype=torch.bool, device="cpu").tril(keys - 4)
        with torch.set_grad_enabled(grad):
            same(default, kernel, query, key, key)
            same(default, kernel, query, key, key, causal=True)
            same(default, kernel, query, key, key, as_bias(seen))
            same(default, kernel, query, key, key, as_bias(seen), sinks=sinks, return_weights=True)
            same(default, kernel, query, key[:, :, :3], key[:, :, :3], causal=True, traced=True)
            same(default, kernel, query, key, key, as_bias(seen), sinks=sinks, return_weights=True, traced=True)


@pytest.mark.parametrize("module", [RMSNorm(16), LayerNorm(16), FeedForward(16, 32), GatedFeedForward(16, 32)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_networks(module: nn.Module, dtype: torch.dtype, default: Callable) -> None:
    module.to(dtype)
    for x in (made(dtype, 1, 1, 16), made(dtype, 2, 3, 16)):
        with torch.no_grad():
            same(default, module, x)
        same(default, module, x)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_built_under_another_default(norm: type, default: Callable) -> None:
    with default():
        module = norm(8, device="cpu", dtype=torch.float32)
    x = made(torch.float32, 1, 1, 8)
    with torch.no_grad():
        assert torch.equal(module(x), norm(8)(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions(dtype: torch.dtype, default: Callable) -> None:
    heads, at = made(dtype, 2, 3, 5, 8), torch.arange(5).expand(2, 5)
    distance = at.unsqueeze(-1) - at.unsqueeze(-2)
    relative = RelativePositionBias(3).to(dtype)
    # Schemes that are new each time form their tables under the default.
    same(default, lambda: RotaryEmbedding(8).table(range(5), heads))
    same(default, lambda: RotaryEmbedding(8).table(at, heads))
    same(default, lambda: RotaryEmbedding(8).table(range(5)))
    same(default, lambda: ALiBi(3).bias(distance))
    same(default, relative.bias, distance)
    x = made(dtype, 2, 5, 8)
    for before in ((4,), (0, 3), (0, 40)):
        same(default, lambda before=before: SinusoidalPositions(8)(x, step_of(before, x)))


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "window": {"window_size": 4, "num_sinks": 1},
    "window, softcap": {"softcap": 5.0, "window_size": 4, "attention": "gqa", "num_groups": 2},
    "alibi": {"position": "alibi"},
    "sinusoidal": {"position": "sinusoidal"},
    "learned": {"position": "learned", "max_length": 32, "norm": "layer"},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_models_read_and_write_alike(options: str, dtype: torch.dtype, default: Callable) -> None:
    model = DecoderOnlyTransformer(50, 32, 4, 64, 2, **OPTIONS[options]).eval().to(dtype)
    ids = torch.randint(50, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    same(default, model, ids)
    with torch.no_grad():
        same(default, model, ids, mask)
    same(default, model.generate, ids, max_new_tokens=6)
    same(default, model.generate, ids, max_new_tokens=4, attention_mask=mask)


def test_encoder_decoders_read_and_write_alike(default: Callable) -> None:
    model = EncoderDecoderTransformer(50, 50, 32, 4, 64, 2).eval()
    ids = torch.randint(50, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    same(default, model, ids, ids, mask)
    same(default, model.generate, ids, max_new_tokens=4)


@pytest.mark.parametrize("kind", [MultiHeadAttention, lambda *given, **more: GroupQueryAttention(*given, 2, **more)])
def test_attention_gives_weights_and_reads_sources_alike(kind: Callable, default: Callable) -> None:
    module = kind(32, 4).eval()
    x, source = made(torch.float32, 2, 3, 32), made(torch.float32, 2, 5, 32)
    mask = torch.ones(2, 5, dtype=torch.bool).tril(3)
    same(default, module, x, return_weights=True)
    same(default, module, x, attention_mask=mask[:, :3], return_weights=True)
    same(default, module, x, kv=source, kv_mask=mask, return_weights=True)


@torch.no_grad()
def test_compiled_attention_alike(default: Callable) -> None:
    """Parts of long keys, which threads share, and a table of distances that is new in each call."""
    query, key = made(torch.float32, 1, 4, 1, 8), made(torch.float32, 1, 2, 3000, 8)
    module = GroupQueryAttention(32, 4, 2, True, position=RelativePositionBias(4)).eval()
    x, threads = made(torch.float32, 2, 3, 32), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with tuned(min_parallel_bytes=0, min_part_keys=64):
            same(default, Kernel(0.3), query, key, key)
            same(default, module, x)
    finally:
        torch.set_num_threads(threads)
