"""Measurement of the benchmarks: intervals, order of candidates, rewinding, repetition, peak memory, verdicts."""

import random
import statistics
import time

import pytest
import torch

from benchmarks.__main__ import measure_all
from benchmarks.bars import all_bars, peer_is_ahead
from benchmarks.case import Candidate, Case, Limit, Setup
from benchmarks.decode_step import SINGLE
from benchmarks.grid import QUICK
from benchmarks.intervals import Interval, interval
from benchmarks.runner import OURS, Measured, measure
from benchmarks.training import peak_bytes


class Clock:
    """A time that only candidates let pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def taking(self, seconds: float, log: list[str], name: str) -> Candidate:
        def run() -> None:
            self.now += seconds
            log.append(name)

        return Candidate(run, lambda: log.append(f"{name} rewound"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = random.Random(0)
    for count in (6, 11, 25, 40):
        found = [interval([rng.expovariate(1.0) for _ in range(count)]) for _ in range(2000)]
        inside = statistics.fmean(each.low <= 0.693147 <= each.high for each in found)
        assert 0.94 <= inside <= 0.995


def test_few_values_give_their_range() -> None:
    assert interval([3.0, 1.0, 2.0]) == Interval(2.0, 1.0, 3.0)
    assert interval([5.0]) == Interval(5.0, 5.0, 5.0)


def test_candidates_take_turns_and_rewind(clock: Clock) -> None:
    log: list[str] = []
    setup = Setup(
        clock.taking(0.1, log, "a"),
        {"b": clock.taking(0.2, log, "b"), "c": clock.taking(0.3, log, "c")},
        {"d": clock.taking(0.05, log, "d")},
        [
            Limit(clock.taking(0.04, log, "reading").run, 8e9, 4e9, "GB/s"),
            Limit(clock.taking(0.04, log, "arithmetic").run, 8e9, 3e9, "GFLOP/s"),
        ],
        tokens=2,
    )
    found = measure(Case("kind", {"n": 1}, lambda: setup), seconds=8.78)
    assert found.rounds == 10  # what is left after two calls of each, at 0.73 seconds a round
    assert found.seconds[OURS].median == pytest.approx(0.05)
    assert found.ratios["b"].median == pytest.approx(2.0)
    assert found.ratios["d"].median == pytest.approx(0.5)
    assert found.best_peer == "b"
    assert found.share is not None
    assert found.share.median == pytest.approx(0.2)
    assert found.rate == pytest.approx(200.0)
    assert found.rate_unit == "GB/s"
    calls = [name for name in log if "rewound" not in name]
    assert calls.count("a") == calls.count("b") == 12
    assert log.count("c rewound") == 12
    forwards = ["a", "b", "c", "d", "reading", "arithmetic"]
    assert calls[-12:] == [*reversed(forwards), *forwards]


def test_quick_work_comes_in_bursts_without_their_first_call(clock: Clock) -> None:
    burst = [1.0, 0.01, 0.01, 0.018, 0.018]
    costs = [0.018, 0.018, *burst * 6]  # two trials, and the rounds

    def run() -> None:
        clock.now += costs.pop(0)

    found = measure(Case("kind", {}, lambda: Setup(Candidate(run))), seconds=0.0)
    assert not costs
    assert found.seconds[OURS] == pytest.approx((0.014, 0.014, 0.014))


def test_dear_work_is_measured_from_its_first_call_on_but_ours_which_compiles_in_it(clock: Clock) -> None:
    log: list[str] = []
    both = Setup(clock.taking(5.0, log, "ours"), {"peer": clock.taking(4.0, log, "peer")})
    found = measure(Case("kind", {}, lambda: both), seconds=1.0)
    assert found.rounds == log.count("peer") == 3
    assert log.count("ours") == 4
    log.clear()
    found = measure(Case("kind", {}, lambda: both), seconds=1.0, hurry=True)
    assert found.rounds == log.count("peer") == 1
    assert log.count("ours") == 2


def test_the_larger_limit_of_each_round_counts(clock: Clock) -> None:
    limits = [
        Limit(clock.taking(0.1, [], "reading").run, 1e9, 2e9, "GB/s"),
        Limit(clock.taking(0.1, [], "arithmetic").run, 1e9, 3e9, "GFLOP/s"),
    ]
    found = measure(Case("kind", {}, lambda: Setup(clock.taking(0.6, [], "ours"), limits=limits)), seconds=9.0)
    assert found.share is not None
    assert found.share.median == pytest.approx(0.5)
    assert (found.rate, found.rate_unit) == (pytest.approx(10.0), "GFLOP/s")


def test_a_case_has_its_own_threads_and_is_closed(clock: Clock) -> None:
    before, seen = torch.get_num_threads(), []
    timed = clock.taking(1.0, [], "ours").run
    ours = Candidate(lambda: [timed(), seen.append(torch.get_num_threads())])
    setup = Setup(ours, close=lambda: seen.append("closed"))
    measure(Case("kind", {}, lambda: setup, threads=before + 1), seconds=0.0)
    assert seen.pop() == "closed"
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_a_point_with_a_peer_ahead_is_measured_once_more(clock: Clock) -> None:
    log: list[str] = []
    built = []

    def build(theirs: float) -> Setup:
        built.append(theirs)
        return Setup(clock.taking(1.0, log, "ours"), {"peer": clock.taking(theirs, log, "peer")})

    cases = [Case("kind", {"n": n}, lambda n=n: build((0.5, 2.0)[n])) for n in range(2)]
    behind, ahead = measure_all(cases, QUICK, 50.0)
    assert built == [0.5, 0.5, 2.0]
    assert behind.again
    assert peer_is_ahead(behind)
    assert not ahead.again
    assert not peer_is_ahead(ahead)


def test_the_peak_of_a_call() -> None:
    def run() -> None:
        a = torch.zeros(1000)
        b = torch.zeros(500)
        del a
        torch.zeros(700), b

    assert peak_bytes(run, "cpu") == 4 * 1500


def exactly(value: float) -> Interval:
    return Interval(value, value, value)


def decode(dtype: str, cached: int, groups: int, single: float, dynamic: float, share: float) -> Measured:
    """A point at which our float32 takes `single` times, and transformers `dynamic` times our time."""
    point = {"dtype": dtype, "batch": 1, "cached": cached, "G": groups}
    name = "transformers, DynamicCache"
    ratios = {name: exactly(dynamic)} | ({SINGLE: exactly(single)} if dtype == "bfloat16" else {})
    seconds = {each: exactly(1.0) for each in (OURS, *ratios)}
    return Measured("One decode step", point, 9, seconds, (name,), ratios, exactly(share), 9.0, "GB/s", {})


def coded(codec: str, cached: int, single: float) -> Measured:
    """A point at which the kernel takes `single` times as long over float32 keys as over those of a codec."""
    point = {"codec": codec, "batch": 1, "cached": cached, "G": 4}
    seconds = {each: exactly(1.0) for each in (OURS, SINGLE)}
    kind = "One decode step of the kernel over coded keys"
    return Measured(kind, point, 9, seconds, (), {SINGLE: exactly(single)}, exactly(0.5), 9.0, "GB/s", {})


@pytest.mark.parametrize(
    ("results", "asked", "reached"),
    [
        ([decode("float32", 16384, 4, 1.0, 4.0, 0.55)], "G 4: 4 times", True),
        ([decode("float32", 16384, 4, 1.0, 3.9, 0.55)], "G 4: 4 times", False),
        ([decode("float32", 2048, 4, 1.0, 3.9, 0.55)], "G 4: 4 times", None),
        ([decode("bfloat16", 16384, 4, 1.0, 4.0, 0.55)], "G 4: 4 times", None),
        ([decode("float32", 16384, 4, 1.0, 4.0, 0.55)], "G 4: 55%", True),
        (
            [decode("float32", 16384, 4, 1.0, 4.0, 0.55), decode("float32", 2048, 4, 1.0, 4.0, 0.54)],
            "G 4: 55%",
            False,
        ),
        ([decode("float32", 128, 4, 1.0, 4.0, 0.1)], "G 4: 55%", None),
        ([decode("float32", 128, 4, 1.0, 0.97, 0.1)], "no peer ahead", True),
        ([decode("float32", 128, 4, 1.0, 0.96, 0.1)], "no peer ahead", False),
        ([decode("bfloat16", 128, 4, 0.98, 1.0, 0.1)], "not slower than float32 at any", True),
        ([decode("bfloat16", 128, 4, 0.96, 1.0, 0.1)], "not slower than float32 at any", False),
        ([decode("float32", 128, 4, 1.0, 1.0, 0.1)], "not slower than float32 at any", None),
        ([decode("bfloat16", 4096, 16, 1.67, 1.0, 0.1)], "G 16: at most 0.6 of float32's", True),
        ([decode("bfloat16", 4096, 16, 1.66, 1.0, 0.1)], "G 16: at most 0.6 of float32's", False),
        ([decode("bfloat16", 2048, 16, 1.66, 1.0, 0.1)], "G 16: at most 0.6 of float32's", None),
        ([coded("int8", 16384, 1.67), coded("int4", 16384, 1.0)], "G 4: at most 0.6 of float32's", True),
        ([coded("int8", 16384, 1.66)], "G 4: at most 0.6 of float32's", False),
        ([coded("int8", 4096, 1.66)], "G 4: at most 0.6 of float32's", None),
        ([], "import of transformer: under", None),
    ],
)
def test_verdicts(results: list[Measured], asked: str, reached: bool | None) -> None:
    (bar,) = [bar for bar in all_bars(results) if asked in bar.asked]
    assert bar.reached is reached
