"""The library on each device that is there: a GPU where PyTorch finds one, and the CPU, which also tests these tests.

`pytest -m device` runs them alone; `benchmarks/gpu.sh` does so on a card.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding
from transformer import GroupQueryAttention
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


@torch.inference_mode()
def test_a_step_does_not_wait(device: str) -> None:
    model = decoder_only("gqa rotary, window, both", torch.float32).to(device).enable_cache()
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
@torch.inference_mode()
def test_compiled_steps(device: str) -> None:
    """Steps over a frozen layout are the eager ones; on a card they are CUDA graphs."""
    model = decoder_only("gqa rotary, window, both", torch.float32).to(device)
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
    torch.testing.assert_close(torch.cat(outs, 1), expected[:, 6:], rtol=0, atol=1e-4)
