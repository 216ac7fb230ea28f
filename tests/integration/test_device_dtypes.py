"""Use of float64: only on the CPU, because not all devices have it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer
from transformer.blocks import LayerNorm, RMSNorm
from transformer.kernels import Kernel, Sinks
from transformer.kernels.biases import as_bias
from transformer.positions import (
    ALiBi,
    LearnedPositions,
    Positions,
    RelativePositionBias,
    RotaryEmbedding,
    SinusoidalPositions,
)
from transformer.positions.yarn import YaRNScaling

META = torch.device("meta")


class OnlyOnCPU(TorchDispatchMode):
    """Fails where an operation gives a float64 tensor on another device than the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dtype is torch.float64 and not tensor.is_cpu:
                raise AssertionError(f"{func} formed a float64 tensor {list(tensor.shape)} on {tensor.device}")
        return result


def heads(number: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(2, number, length, 8, device=META, dtype=dtype)


class Stepping:
    """The step of a call in which only the device knows the positions."""

    def __init__(self, x: Tensor) -> None:
        self.batch, self.tokens, self.device = x.shape[0], x.shape[1], x.device
        self.at = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        self.token_positions: Positions = self.at


def test_the_mode_finds_one() -> None:
    with OnlyOnCPU(), pytest.raises(AssertionError, match="formed a float64 tensor"):
        torch.empty(2, device=META).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_kernels(traced: bool, softcap: float | None, dtype: torch.dtype) -> None:
    kernel, query, key = Kernel(0.3, softcap), heads(4, 5, dtype), heads(2, 5, dtype)
    sinks = Sinks(query, key[:, :, :2], key[:, :, :2], None)
    seen = as_bias(torch.ones(5, 5, dtype=torch.bool, device=META))
    with OnlyOnCPU():
        for given in ({}, {"causal": True}, {"bias": seen}, {"bias": seen, "sinks": sinks, "return_weights": True}):
            kernel(query, key, key, **given, traced=traced)


@pytest.mark.parametrize("scaling", [None, YaRNScaling(4.0, 64)], ids=["plain", "yarn"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool, scaling: YaRNScaling | None) -> None:
    with OnlyOnCPU():
        rotary = RotaryEmbedding(8, interleaved=interleaved, scaling=scaling)
        like = heads(2, 5)
        for positions in (range(5), torch.zeros(2, 5, dtype=torch.int64, device=META)):
            rotary.rotate(like, rotary.table(positions, like))


@pytest.mark.parametrize("module", [LearnedPositions(8, 16), SinusoidalPositions(16), RMSNorm(16), LayerNorm(16)])
def test_modules_over_tokens(module: nn.Module) -> None:
    module.to(META)
    x = torch.empty(2, 5, 16, device=META)
    with OnlyOnCPU():
        module(x, Stepping(x)) if isinstance(module, (LearnedPositions, SinusoidalPositions)) else module(x)


@pytest.mark.parametrize("scheme", [ALiBi(4), RelativePositionBias(4)])
def test_biases(scheme: nn.Module) -> None:
    with OnlyOnCPU():
        scheme.to(META).bias(torch.zeros(5, 5, dtype=torch.int64, device=META))


OPTIONS: dict[str, dict[str, object]] = {
    "rotary": {},
    "window": {"window_size": 4, "num_sinks": 1, "softcap": 5.0},
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "learned": {"position": "learned", "max_length": 32, "norm": "layer"},
    "sinusoidal": {"position": "sinusoidal"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_models(masked: bool, options: str) -> None:
    ids = torch.zeros(2, 6, dtype=torch.int64, device=META)
    mask = torch.ones_like(ids) if masked else None
    with OnlyOnCPU():
        DecoderOnlyTransformer(50, 32, 4, 64, 2, **OPTIONS[options]).to(META)(ids, mask)
        EncoderDecoderTransformer(50, 50, 32, 4, 64, 2, **OPTIONS[options]).to(META)(ids, ids, mask)
