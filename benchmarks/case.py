"""Cases of a comparison: one point of the grid, its candidates, and the limits of the machine."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple


def nothing() -> None:
    """Rewinding of a candidate, and closing of a setup, that need none."""


class Candidate(NamedTuple):
    """One implementation that does the work of a case."""

    run: Callable[[], object]
    rewind: Callable[[], object] = nothing
    """Called after each burst, untimed: removes the tokens that the runs added to a cache."""
    held: int | None = None
    """Bytes of its cache; in training, the peak allocation of a step."""


class Limit(NamedTuple):
    """Limit of the machine, measured in turn with the candidates."""

    run: Callable[[], object]
    does: float
    """Bytes read, or operations, in one `run`."""
    needs: float
    """Bytes or operations that a candidate's run needs at least."""
    unit: str
    """Name of the unit 1e9 per second."""


class Setup(NamedTuple):
    """A case that is ready to run."""

    ours: Candidate
    peers: Mapping[str, Candidate] = {}
    """Other libraries with the same work; targets compare with the best of them."""
    others: Mapping[str, Candidate] = {}
    """Other implementations, ours or a bare kernel, that are shown for comparison."""
    limits: Sequence[Limit] = ()
    """What a run needs of the machine; the largest of the times is the limit of the case."""
    tokens: int = 1
    """New tokens of one run; what is printed is per token."""
    details: Callable[[], dict[str, float]] = dict
    """Further figures, worked out after the measurement."""
    close: Callable[[], object] = nothing
    """Ends what does not end with the setup, such as a process."""


class Case(NamedTuple):
    """One point. It is built when it is measured, so that only one case is in memory at a time."""

    kind: str
    point: Mapping[str, str | int]
    build: Callable[[], Setup]
    weight: float = 1.0
    """Its time, in units of `Grid.second`."""
    training: bool = False
    """Whether gradients are recorded."""
    threads: int | None = None
    """Threads of this case; None: those of the run."""


Cases = Iterable[Case]
