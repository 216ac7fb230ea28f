"""Modules whose few queries are attended by positions, against the same modules with masks."""

from __future__ import annotations

import copy
import itertools
import logging

import pytest
import torch
from torch import Tensor, nn

from tests.internals import without_compiled_kernels
from transformer import GroupQueryAttention
from transformer.attention import by_positions
from transformer.kernels.compiled import are_available
from transformer.positions import ALiBi, RelativePositionBias, RotaryEmbedding, ScoreBias

pytestmark = pytest.mark.skipif(not are_available(), reason="numba is missing, or turned off")


class Learned(ScoreBias):
    """A number for each distance, which goes on to change with it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.factor = nn.Parameter(torch.linspace(-0.5, 0.5, 4))

    def bias(self, distance: Tensor) -> Tensor:
        return self.factor.view(-1, 1, 1) * (0.01 * distance.unsqueeze(-3)).sin()


class Shared(Learned):
    """One bias for all heads, which only broadcasts to them."""

    def bias(self, distance: Tensor) -> Tensor:
        return self.factor[0] * (0.1 * distance.unsqueeze(-3)).sin()


class Steady(Learned):
    """A number for each head, and the same at every distance."""

    def bias(self, distance: Tensor) -> Tensor:
        return self.factor.view(-1, 1, 1)


class Growing(RelativePositionBias):
    """T5's bias with a number that grows with the distance, also where T5's stays as it is."""

    def __init__(self) -> None:
        super().__init__(4, num_buckets=4, max_distance=3)

    def bias(self, distance: Tensor) -> Tensor:
        return super().bias(distance) - 0.1 * distance.unsqueeze(-3)


SCHEMES = {
    "none": lambda: None,
    "rotary": lambda: RotaryEmbedding(8),
    "alibi": lambda: ALiBi(4),
    "T5": lambda: RelativePositionBias(4, num_buckets=8, max_distance=12),
    "T5, both directions": lambda: RelativePositionBias(4, num_buckets=8, max_distance=12, bidirectional=True),
    "learned": Learned,
    "one for all heads": Shared,
    "one for all distances": Steady,
    "T5 that grows": Growing,
}
MASKS = {
    "no padding": [None] * 4,
    "padding": [
        torch.tensor([[1, 1, 1, 0, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool(),
        torch.tensor([[1], [0], [1]]).bool(),
        torch.tensor([[1, 1], [0, 1], [0, 0]]).bool(),
        None,
    ],
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (3, 0), (4, 2)])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_chunks_as_with_masks(
    scheme: str, masks: str, window: int | None, sinks: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefill, single tokens and a chunk, cached: the same outputs in every row."""
    torch.manual_seed(0)
    options = {"position": SCHEMES[scheme](), "window_size": window, "num_sinks": sinks}
    module = GroupQueryAttention(32, 4, 2, causal, True, **options).eval()
    other, ran = copy.deepcopy(module), []
    attend = by_positions.attend_by_positions
    monkeypatch.setattr(
        "transformer.attention.over_view.attend_by_positions",
        lambda *given: (ran.append(out := attend(*given)), out)[1],
    )
    chunks = [torch.randn(3, length, 32) for length in (5, 1, 2, 3)]
    ours = [module(chunk, attention_mask=mask) for chunk, mask in zip(chunks, MASKS[masks], strict=True)]
    without_compiled_kernels(monkeypatch)
    theirs = [other(chunk, attention_mask=mask) for chunk, mask in zip(chunks, MASKS[masks], strict=True)]
    for found, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=2e-6)
    served = [out is not None for out in ran[: len(ran) // 2]]
    assert all(served) == (causal or not sinks), "a sink ahead of its query needs a mask"


@torch.no_grad()
def test_each_call_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    module = GroupQueryAttention(32, 4, 2, True, position=ALiBi(4)).eval()
    module(torch.randn(1, 3, 32))  # a kernel that is compiled says so
    with caplog.at_level(logging.DEBUG, "transformer.kernels"):
        module(torch.randn(1, 3, 32))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("compiled for ")
    assert "length=3, keys=3" in line
    assert "bias=True, causal=True" in line


@torch.no_grad()
def test_what_needs_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller's bias, weights, and more query rows than the kernel takes."""
    outs = []
    attend = by_positions.attend_by_positions
    monkeypatch.setattr(
        "transformer.attention.over_view.attend_by_positions",
        lambda *given: (outs.append(out := attend(*given)), out)[1],
    )
    module = GroupQueryAttention(32, 4, 2, True, position=ALiBi(4)).eval()
    x = torch.randn(1, 3, 32)
    module(x, attn_bias=torch.zeros(3, 3))
    module(x, return_weights=True)
    module(torch.randn(1, 200, 32))
    with torch.enable_grad():
        module(x)
    assert outs == [None] * 4
    module(x)
    assert outs[-1] is not None


def test_gradients_and_float64_as_before() -> None:
    module = GroupQueryAttention(32, 4, 2, True, position=ALiBi(4)).double()
    for length, grad in itertools.product((1, 3), (False, True)):
        with torch.set_grad_enabled(grad):
            out = module(torch.randn(2, length, 32, dtype=torch.float64))
        assert out.dtype is torch.float64
        assert out.requires_grad == grad
