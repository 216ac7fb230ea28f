"""Residual connection: norms at the named places, dropout on the output of the branch only."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.blocks.loops import residual
from tests.setups import fill, tokens
from transformer.blocks import LayerNorm, Residual, RMSNorm
from transformer.errors import ConfigurationError

PLACEMENTS = {
    "before": {"norm_before"},
    "after": {"norm_after"},
    "both": {"norm_before", "norm_branch"},
    "branch": {"norm_branch"},
}
NORMS = {"rms": partial(RMSNorm, unit_offset=True), "layer": LayerNorm}


def branch(x: Tensor) -> Tensor:
    """No norm hides what this does: neither a scale nor a shift of its own."""
    return (x + 0.5) ** 2 - x.flip(-1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements(placement: str, norm: str) -> None:
    module = Residual(6, NORMS[norm], placement, scale=0.3)
    fill(module, 2)
    module.double()
    x = 3 * tokens(2, 4, 6) + 1
    expected = residual(module, placement, x, branch, scale=0.3)
    torch.testing.assert_close(module(x, branch), expected, atol=1e-12, rtol=0)
    assert {name for name, child in module.named_children() if child is not None} == PLACEMENTS[placement]


def test_the_default_placement() -> None:
    assert dict(Residual(6, RMSNorm).named_children()).keys() == {"norm_before"}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_branch_runs_once_and_the_stream_stays_as_it_was(placement: str) -> None:
    """What came in is not written to, and the branch sees what the norm before it gives."""
    module, seen = Residual(6, partial(nn.LayerNorm, eps=0.5), placement), []
    x = tokens(2, 3, 6, dtype=torch.float32)
    kept = x.clone()
    module(x, lambda given: seen.append(given) or branch(given))
    assert torch.equal(x, kept)
    (given,) = seen
    assert torch.equal(given, module.norm_before(x) if "norm_before" in PLACEMENTS[placement] else x)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dropout_acts_on_what_is_added_while_training(placement: str) -> None:
    """The stream itself is never dropped: each number is that of the stream alone, or with what is added scaled."""
    module = Residual(8, lambda _: nn.Identity(), placement, dropout=0.25)
    x, added = tokens(1, 200, 8), torch.full((1, 200, 8), 3.0, dtype=torch.float64)
    change = module.train()(x, lambda _: added) - x
    kept = (change - 3.0 / 0.75).abs() < 1e-12
    assert bool((kept | (change == 0)).all())
    assert abs(kept.double().mean().item() - 0.75) < 0.05
    assert torch.equal(module.eval()(x, lambda _: added), x + added)
    module.dropout = 0.0
    assert torch.equal(module.train()(x, lambda _: added), x + added)


def test_dropout_comes_after_the_norm_of_a_branch_and_before_the_norm_of_the_sum() -> None:
    """Shown by elements that are exactly 0: a norm after the dropout would change them."""
    x = torch.zeros(1, 50, 8)
    shifted = partial(_Shift, 2.0)
    both = Residual(8, shifted, "both", dropout=0.5).train()(x, lambda given: given)
    # Norm, branch and norm again give 4, of which half is dropped to 0 and the rest is doubled.
    assert set(both.unique().tolist()) == {0.0, 8.0}
    after = Residual(8, shifted, "after", dropout=0.5).train()(x, lambda given: given + 1.0)
    assert set(after.unique().tolist()) == {2.0, 4.0}


class _Shift(nn.Module):
    def __init__(self, by: float, dim: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("placement", {"placement": value}) for value in ("pre", "", "Before", None, 1)),
        *(("dropout", {"dropout": value}) for value in (-0.1, 1.0, math.nan, math.inf)),
        *(("scale", {"scale": value}) for value in (0.0, -1.0, math.nan, "1", True)),
        ("dim", {"embed_dim": 0}),
    ],
    ids=str,
)
def test_refused(name: str, options: dict) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: expected .*, got "):
        Residual(**{"embed_dim": 4, "norm": RMSNorm, **options})
