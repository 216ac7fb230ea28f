"""Measurement of candidates in turn, so that drift of the machine affects all of them equally."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .case import Candidate, Case, Limit, Setup
from .intervals import Interval, interval

OURS, LIMIT = "ours", "limit"

BURST = 5
"""Calls in a row of quick work. A burst is what decoding is: the same again and again. Its first call, which finds
another candidate's data in the CPU's cache, is not counted."""

QUICK_CALL = 0.02
"""Seconds up to which a call is quick work."""

MOST = 40
"""Rounds, however quick."""


@dataclass(frozen=True)
class Measured:
    """Results at one point."""

    kind: str
    point: Mapping[str, str | int]
    rounds: int
    seconds: dict[str, Interval]
    """Per token, of us, of every peer and of every other way."""
    peers: tuple[str, ...]
    ratios: dict[str, Interval]
    """Their time as a multiple of ours, round by round."""
    share: Interval | None
    """The time that the machine would need at best, as a part of ours, round by round."""
    rate: float | None
    """How much of the limit that took longest the machine did meanwhile, in `rate_unit`."""
    rate_unit: str | None
    held: dict[str, int]
    details: dict[str, float] = field(default_factory=dict)
    again: bool = False
    """Whether this is a second measurement, of a point where a peer was ahead in the first."""

    @property
    def best_peer(self) -> str | None:
        """The fastest other library."""
        return min(self.peers, key=lambda name: self.seconds[name].median, default=None)

    @property
    def lead(self) -> Interval | None:
        """The time of the best other library divided by ours."""
        return None if self.best_peer is None else self.ratios[self.best_peer]


class Timer:
    """Timer of calls, including their work on the device."""

    def __init__(self, device: str) -> None:
        self._wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __call__(self, run: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - began


def measure(case: Case, seconds: float, device: str = "cpu", *, hurry: bool = False, again: bool = False) -> Measured:
    """Measures a case in about `seconds`, with the minimum number of rounds at least; with one in a `hurry`."""
    ends = time.perf_counter() + seconds
    with _threads(case.threads):
        with torch.set_grad_enabled(case.training):
            setup = case.build()
        try:
            with torch.inference_mode(not case.training):
                samples = _rounds(setup, ends, hurry, Timer(device))
                details = setup.details()
        finally:
            setup.close()
    measured = _measured(case, setup, samples, details, again)
    del setup
    gc.collect()
    return measured


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """So many threads for a while; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rounds(setup: Setup, ends: float, hurry: bool, timer: Timer) -> dict[str, list[float]]:
    """Seconds of each candidate in each round."""
    candidates = {OURS: setup.ours, **setup.peers, **setup.others}
    candidates |= {f"{LIMIT} {index}": Candidate(limit.run) for index, limit in enumerate(setup.limits)}
    costs = {name: _burst(candidate, 1, timer) for name, candidate in candidates.items()}
    # The first calls of ours compile kernels.
    costs |= {name: _burst(candidates[name], 1, timer) for name in (OURS, *setup.others)}
    late = time.perf_counter() > ends
    if late and sum(costs.values()) > 1.0:
        # Long runs need no warm-up, so the first measurement of the others counts.
        samples = {name: [cost] for name, cost in costs.items()}
    else:
        samples = {name: [] for name in candidates}
        costs |= {name: min(costs[name], _burst(candidates[name], 1, timer)) for name in setup.peers}
    calls = {name: BURST if cost < QUICK_CALL else 1 for name, cost in costs.items()}
    each = sum(calls[name] * cost for name, cost in costs.items())
    fitting = int((ends - time.perf_counter()) / each)
    taken = len(samples[OURS])
    for turn in range(max((1 if hurry else fewest(each)) - taken, min(MOST, fitting))):
        for name in list(candidates) if turn % 2 else reversed(list(candidates)):
            samples[name].append(_burst(candidates[name], calls[name], timer))
    return samples


def fewest(seconds: float) -> int:
    """The minimum number of rounds, by the seconds of one round: six give a 95 % interval, fewer the range."""
    return 6 if seconds < 1.0 else 3 if seconds < 10.0 else 2


def _burst(candidate: Candidate, calls: int, timer: Timer) -> float:
    """Median seconds of a call, the first of several left out."""
    seconds = [timer(candidate.run) for _ in range(calls)]
    candidate.rewind()
    return statistics.median(seconds[1:] or seconds)


def _measured(
    case: Case, setup: Setup, samples: dict[str, list[float]], details: dict[str, float], again: bool
) -> Measured:
    at_best = [samples.pop(f"{LIMIT} {index}") for index in range(len(setup.limits))]
    ours, limit, share, rate = samples[OURS], None, None, None
    if setup.limits:
        least, limit, taken = _longest(setup.limits, at_best)
        share, rate = _ratio(least, ours), limit.does / statistics.median(taken) / 1e9
    held = {name: each.held for name, each in {OURS: setup.ours, **setup.peers, **setup.others}.items()}
    return Measured(
        kind=case.kind,
        point=case.point,
        rounds=len(ours),
        seconds={name: interval(values).scaled(1 / setup.tokens) for name, values in samples.items()},
        peers=tuple(setup.peers),
        ratios={name: _ratio(theirs, ours) for name, theirs in samples.items() if name != OURS},
        share=share,
        rate=rate,
        rate_unit=None if limit is None else limit.unit,
        held={name: number for name, number in held.items() if number is not None},
        details=details,
        again=again,
    )


def _longest(limits: Sequence[Limit], at_best: list[list[float]]) -> tuple[list[float], Limit, list[float]]:
    """Seconds of the machine at best in each round, the limit that takes longest, and its own samples."""
    needed = [
        [seconds * limit.needs / limit.does for seconds in samples]
        for limit, samples in zip(limits, at_best, strict=True)
    ]
    longest = max(range(len(limits)), key=lambda index: statistics.median(needed[index]))
    return [max(each) for each in zip(*needed, strict=True)], limits[longest], at_best[longest]


def _ratio(theirs: list[float], ours: list[float]) -> Interval:
    """Of two candidates' times in the same round: drift of the machine cancels out."""
    return interval([their / our for their, our in zip(theirs, ours, strict=True)])
