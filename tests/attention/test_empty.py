"""Empty sources and chunks: attention is exactly 0 before the output projection, with the right shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import Options
from tests.setups import SCHEMES, build, tokens
from transformer import EncoderDecoderTransformer

PLAIN = Options(embed_dim=8, num_heads=4, num_groups=2, head_dim=2, causal=False, cached=False)
MODULES = {
    "plain": PLAIN,
    "MQA": replace(PLAIN, num_groups=1),
    "cached": replace(PLAIN, cached=True),
    "softcap": replace(PLAIN, softcap=5.0, cached=True),
    "qk_norm": replace(PLAIN, qk_norm=True),
    "alibi": replace(PLAIN, scheme=SCHEMES["alibi"]),
    "window": replace(PLAIN, window_size=2, num_sinks=1, cached=True),
}


def called(module: nn.Module, x: Tensor, kv: Tensor | None, **options: object) -> Tensor:
    return module(x, kv, **options)


def weighed(module: nn.Module, x: Tensor, kv: Tensor | None, **options: object) -> Tensor:
    out, weights = module(x, kv, return_weights=True, **options)
    keys = x.shape[1] if kv is None else kv.shape[1]
    assert weights.shape == (x.shape[0], 4, x.shape[1], keys)
    assert not weights.any()
    return out


def recorded(module: nn.Module, x: Tensor, kv: Tensor | None, **options: object) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        out = module(x, kv, **options)
        out.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    return out.detach()


def training(module: nn.Module, x: Tensor, kv: Tensor | None, **options: object) -> Tensor:
    module.dropout = 0.5
    return module.train()(x, kv, **options)


def traced(module: nn.Module, x: Tensor, kv: Tensor | None, **options: object) -> Tensor:
    module.use_kv_cache = False
    return torch.func.vmap(lambda x: module(x, kv, **options))(x[None])[0]


def compiled(module: nn.Module, x: Tensor, kv: Tensor | None, **options: object) -> Tensor:
    module.use_kv_cache = False
    torch._dynamo.reset()
    return torch.compile(module, backend="eager", fullgraph=True)(x, kv, **options)


WAYS: list[Callable[..., Tensor]] = [called, weighed, recorded, training, traced, compiled]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def options(masked: bool, rows: int, length: int, keys: int) -> dict[str, Tensor]:
    if not masked:
        return {}
    return {"kv_mask": torch.ones(rows, keys, dtype=torch.bool), "attn_bias": torch.zeros(length, keys)}


CASES = [(name, way) for name in MODULES for way in WAYS if way is not compiled or name in ("plain", "softcap")]


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "way"), CASES)
@torch.no_grad()
def test_a_source_of_no_tokens(name: str, way: Callable[..., Tensor], masked: bool) -> None:
    for dtype in DTYPES if way is not compiled else DTYPES[:1]:
        for rows, length in ((2, 3), (1, 1), (2, 0), (0, 3)):
            module = build(MODULES[name], dtype=dtype).eval()
            x, kv = tokens(rows, length, 8, dtype=dtype), tokens(rows, 0, 8, dtype=dtype)
            out = way(module, x, kv, **options(masked, rows, length, 0))
            assert out.dtype is dtype
            assert torch.equal(out, module.out_proj.bias.expand(rows, length, 8))
            if way is compiled:
                break  # one compilation is slow, and the next would find its length a symbol


@pytest.mark.slow
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["plain", "softcap", "window"])
@torch.no_grad()
def test_a_chunk_of_no_tokens(name: str, way: Callable[..., Tensor], cross: bool) -> None:
    module = build(MODULES[name]).eval()
    x = tokens(2, 0, 8)
    assert way(module, x, tokens(2, 3, 8) if cross else None).shape == (2, 0, 8)


@torch.no_grad()
def test_a_chunk_of_no_tokens_changes_nothing() -> None:
    module, x = build(replace(PLAIN, cached=True, causal=True)).eval(), tokens(2, 4, 8)
    whole = build(replace(PLAIN, causal=True))(x)
    outs = [module(part) for part in (x[:, :0], x[:, :2], x[:, :0], x[:, 2:])]
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=1e-9)
    out, weights = module(x[:, :0], return_weights=True)
    assert (out.shape, weights.shape) == ((2, 0, 8), (2, 4, 0, 4))


@torch.no_grad()
def test_a_source_of_no_tokens_is_kept_and_told_apart() -> None:
    module = build(replace(PLAIN, cached=True)).eval()
    x, kv, empty = tokens(2, 3, 8), tokens(2, 4, 8, seed=1), tokens(2, 0, 8)
    fresh = module(x, kv)
    for source, wanted in ((empty, module.out_proj.bias.expand(2, 3, 8)), (empty, None), (kv, fresh)):
        out = module(x, source)
        torch.testing.assert_close(out, module.out_proj.bias.expand(2, 3, 8) if wanted is None else wanted)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_models(cached: bool, grad: bool) -> None:
    """A source of no tokens is as one of which none is real; a chunk of none changes nothing."""
    torch.manual_seed(0)
    model = EncoderDecoderTransformer(16, 16, 8, 2, 8, 1).double().eval()
    source, target = torch.randint(16, (2, 3)), torch.randint(16, (2, 3))
    with torch.set_grad_enabled(grad):
        hidden = model(source, target, torch.zeros(2, 3, dtype=torch.bool))
        if cached:
            model.enable_cache()
        logits = model(source[:, :0], target)
        torch.testing.assert_close(logits, hidden, rtol=0, atol=1e-9)
        states = torch.zeros(2, 0, 8, dtype=torch.float64)
        model.clear_cache()
        logits = model(None, target, encoder_hidden_states=states)
        torch.testing.assert_close(logits, hidden, rtol=0, atol=1e-9)
        model.clear_cache()
        chunks = [model(None, part, encoder_hidden_states=states) for part in (target[:, :0], target)]
    assert [each.shape[1] for each in chunks] == [0, 3]
    torch.testing.assert_close(chunks[1], hidden, rtol=0, atol=1e-9)
