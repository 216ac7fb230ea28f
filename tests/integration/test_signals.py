"""Interrupted calls: the conversation is as before or after the call, and the next call is right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from benchmarks.interrupted import Tally, restore_modes, run
from benchmarks.interrupts import after, at_line, lines, signals
from benchmarks.signals import KINDS, ModelStep, ModuleStep
from transformer import MultiHeadAttention

SIGNALS, PLACES = 100, 150


def check(tally: Tally) -> None:
    assert not tally.failures, "\n".join([str(tally.failures), *tally.first])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_signals_at_random_times(name: str) -> None:
    """By a timer, somewhere within the time that the call takes."""
    tally = run(KINDS[name], signals(KINDS[name], SIGNALS), name)
    check(tally)
    assert tally.interrupted > SIGNALS / 10, "they come while the call runs"


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_interrupts_at_every_line(name: str) -> None:
    """At the beginning of lines that keep and publish what a call writes, so that nothing is luck."""
    places = lines(KINDS[name], PLACES)
    tally = run(KINDS[name], places, name)
    check(tally)
    assert tally.interrupted > 0.9 * len(places) > 0


# --- what the tests above can see -------------------------------------------------------------------------------------


class Halves(ModelStep):
    """Two layers that are called in sequence, without a transaction."""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleList(MultiHeadAttention(8, 2, True, True) for _ in range(2))

    def call(self) -> object:
        x = torch.ones(1, 1, 8, dtype=torch.float64)
        for layer in self.model:
            x = layer(x)
        return x


class Forgetful(ModelStep):
    """A model without caches that turns them on for the time of a call, and does not put that back."""

    live = False

    def call(self) -> object:
        self.model.enable_cache()
        out = super().call()
        self.model.disable_cache()
        return out


class Jammed(ModuleStep):
    """A module with a flag that is taken for the time of a call, and stays where that is cut off."""

    taken = False

    def call(self) -> object:
        if self.taken:
            raise RuntimeError("taken")
        self.taken = True
        out = super().call()
        self.taken = False
        return out


@pytest.mark.parametrize(
    ("kind", "failure"),
    [(Halves, "between"), (Forgetful, "switched"), (Jammed, "stuck")],
    ids=lambda of: getattr(of, "__name__", of),
)
def test_what_goes_wrong_is_counted(kind: type[ModelStep], failure: str) -> None:
    tally = run(kind, lines(kind, 20))
    assert tally.failures.get(failure, 0) > 3, tally.failures


def test_an_interrupt_is_counted_where_it_was_early_enough() -> None:
    calls: list[int] = []
    assert not after(60.0)(lambda: calls.append(1))
    assert after(1e-3)(lambda: [calls.append(2) for _ in iter(int, 1)])
    assert not at_line(10**6)(lambda: calls.append(3))
    assert calls[0] == 1
    assert calls[-1] == 3


@pytest.fixture(autouse=True)
def _modes() -> Iterator[None]:
    """What PyTorch's contexts leave is not for the tests that come after."""
    with torch.no_grad():
        yield
        restore_modes()
