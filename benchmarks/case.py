"""What a comparison is: one point of the grid, who does the work there, and what bounds it."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple


def nothing() -> None:
    """What a candidate does that needs no rewinding."""


class Candidate(NamedTuple):
    """Somebody who does the work of a case."""

    run: Callable[[], object]
    rewind: Callable[[], object] = nothing
    """Called after each burst, untimed: what the runs added to a cache is taken out again."""
    held: int | None = None
    """Bytes of its cache; in training, the most that a step allocates."""


class Limit(NamedTuple):
    """What the machine allows at best, measured in turn with the candidates."""

    run: Callable[[], object]
    does: float
    """Bytes read, or operations, in one `run`."""
    needs: float
    """Those that a candidate's run cannot do without."""
    unit: str
    """What 1e9 of them in a second are called."""


class Setup(NamedTuple):
    """A case with everything in place."""

    ours: Candidate
    peers: Mapping[str, Candidate] = {}
    """Other libraries at the same work: the bars rest on the best of them."""
    others: Mapping[str, Candidate] = {}
    """Other ways of doing it, ours or a bare kernel's, that are shown beside."""
    limit: Limit | None = None
    tokens: int = 1
    """New tokens of one run; what is printed is per token."""
    details: Callable[[], dict[str, float]] = dict
    """Further figures, worked out after the measurement."""


class Case(NamedTuple):
    """One point. Building is put off until its turn, so that only one case is in memory at a time."""

    kind: str
    point: Mapping[str, str | int]
    build: Callable[[], Setup]
    weight: float = 1.0
    """Its share of the time, relative to others."""
    training: bool = False
    """Whether gradients are recorded."""


Cases = Iterable[Case]
