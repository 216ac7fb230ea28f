"""The library on each device that is there: a GPU where PyTorch finds one, and the CPU, which also tests these tests.

`pytest -m device` runs them alone; `benchmarks/gpu.sh` does so on a card.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding
from transformer import GroupQueryAttention
from transformer.kernels import backend
from transformer.positions import RotaryEmbedding

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PIECES = (40, 1, 1, 7, 16, 1)
"""Tokens of the calls of one sequence."""

BOUNDS = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": 12},
    "window and sinks": {"window_size": 8, "num_sinks": 3},
    "fixed size": {"max_cache_length": 80},
    "soft cap": {"softcap": 20.0},
}

pytestmark = [pytest.mark.device, pytest.mark.parametrize("device", DEVICES)]


@contextmanager
def no_waits(device: str) -> Iterator[None]:
    """On a card, a wait of the host is an error; elsewhere nothing."""
    if device == "cuda":
        with warnings.catch_warnings():
            # torch says once per process that the mode does not see every wait.
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@torch.inference_mode()
def test_pieces_and_padding(device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """A module in pieces is one call in float64 on the CPU, and a padded row is the row alone."""
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    for groups in (8, 2, 1):
        torch.manual_seed(1)
        module = GroupQueryAttention(128, 8, groups, True, position=RotaryEmbedding(16), **options).eval()
        x = torch.randn(2, sum(PIECES), 128)
        expected = copy.deepcopy(module).double()(x.double())
        module.use_kv_cache = True
        module, x = module.to(device, dtype), x.to(device, dtype)
        out = torch.cat([module(piece) for piece in x.split(PIECES, 1)], 1)
        assert (out.cpu().double() - expected).abs().max() < BOUNDS[dtype]
        module.kv_cache = None
        padded = module(x[:, :20], attention_mask=padding([(0, 20), (7, 13)], 20).to(device))
        module.kv_cache = None
        alone = module(x[1:, 7:20])
        assert (padded[1:, 7:] - alone).abs().max() < BOUNDS[dtype]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [8, 2, 1])
@torch.inference_mode()
def test_rows_of_different_lengths(device: str, groups: int, window: int | None, causal: bool) -> None:
    """A padded prompt, steps and a chunk in 16 bits are each row alone in float64; on a card flash attention serves."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"position": RotaryEmbedding(16), "window_size": window}
    module = GroupQueryAttention(128, 8, groups, causal, True, **options).eval()
    exact = copy.deepcopy(module).double()
    module = module.to(device, torch.bfloat16)
    x = torch.randn(3, 20, 128)
    rows = [(0, 12), (7, 5), (0, 0)]
    calls = [(x[:, :12], padding(rows, 12)), *((x[:, at : at + 1], None) for at in (12, 13))]
    if window is None:
        calls.append((x[:, 14:18], None))
    served = backend("flash") if device == "cuda" and (causal or window is None) else nullcontext()
    with served:
        outs = [
            module(part.to(device, torch.bfloat16), attention_mask=None if mask is None else mask.to(device))
            for part, mask in calls
        ]
    for row, (first, real) in enumerate(rows):
        exact.kv_cache = None
        for number, (part, mask) in enumerate(calls):
            begin = first if mask is not None else 0
            length = real if mask is not None else part.shape[1]
            if length:
                right = exact(part[row : row + 1, begin : begin + length].double())
                found = outs[number][row : row + 1, begin : begin + length].cpu().double()
                assert (found - right).abs().max() < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"stop_tokens": [3]}, {"use_cache": False}], ids=str)
def test_generation(device: str, options: dict[str, Any]) -> None:
    """The tokens of the CPU, in float64, with padded rows."""
    prompt, real = ids(3, 6), padding([(0, 6), (2, 4), (5, 1)], 6)
    for model in (
        decoder_only("gqa rotary, window, both"),
        decoder_only("mqa alibi, window and sinks"),
        encoder_decoder(),
    ):
        expected = copy.deepcopy(model).generate(prompt, real, max_new_tokens=8, **options)
        out = model.to(device).generate(prompt.to(device), real.to(device), max_new_tokens=8, **options)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_step_does_not_wait(device: str, dtype: torch.dtype) -> None:
    model = decoder_only("gqa rotary, window, both", dtype).to(device).enable_cache()
    prompt, real, token = ids(2, 6).to(device), padding([(0, 6), (2, 4)], 6).to(device), ids(2, 1).to(device)
    for mask in (None, real):
        model.clear_cache()
        model(prompt, mask)
        model(token)
        with no_waits(device):
            out = model(token)
        assert out.shape == (2, 1, VOCAB)
    if device == "cuda":
        with pytest.raises(RuntimeError, match="synchroniz"), no_waits(device):
            token.sum().item()


# The compiler recommends less exact products for float32, and records an empty graph of its own first.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_compiled_steps(device: str, dtype: torch.dtype) -> None:
    """Steps over a frozen layout are the eager ones; on a card they are CUDA graphs."""
    model = decoder_only("gqa rotary, window, both", dtype).to(device)
    tokens = ids(1, 12).to(device)
    expected = copy.deepcopy(model)(tokens)
    model.enable_cache(max_length=16)
    model(tokens[:, :6])
    model.kv_cache.freeze_layout()
    torch._dynamo.reset()
    step = torch.compile(
        model, fullgraph=True, **({"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"})
    )
    outs: list[Tensor] = [step(token).clone() for token in tokens[:, 6:].split(1, 1)]
    bound = 1e-4 if dtype is torch.float32 else BOUNDS[dtype]
    torch.testing.assert_close(torch.cat(outs, 1), expected[:, 6:], rtol=0, atol=bound)
