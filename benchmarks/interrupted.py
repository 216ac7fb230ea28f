"""Interrupted calls: the state after a KeyboardInterrupt, compared with a twin that was never interrupted.

A subject is called repeatedly. Each try interrupts one call, by a signal or at a chosen line, and then checks whether
the conversation is as before the call or as after it, and whether the next call gives what the twin's gives.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from transformer import KVCache
from transformer.attention import Attention

TOLERANCE = 1e-9

Interrupt = Callable[[Callable[[], object]], bool]
"""Runs a call, raises KeyboardInterrupt in it, and tells whether it was early enough. Nothing of it comes out."""


class Subject(ABC):
    """A model whose calls are interrupted; two subjects of one class are equal."""

    most_tokens = 60
    """From here on the conversation begins anew."""

    def __init__(self) -> None:
        self.model = self.build().double().eval()
        self.start = self.snapshot()
        self._on = {m: m.use_kv_cache for m in self.model.modules() if isinstance(m, Attention)}

    @abstractmethod
    def build(self) -> nn.Module:
        """The model; with its caches on if the conversation is its own."""

    @abstractmethod
    def call(self) -> object:
        """The call that is interrupted; gives a tensor or a list of tensors."""

    def parts(self) -> Iterator[object]:
        """The call in steps, after each of which an interrupt may leave it."""
        yield self.call()

    def stages(self) -> list[Any]:
        """The call, and the snapshots that an interrupt may leave: before it, and after each part of it."""
        return [self.snapshot(), *(self.snapshot() for _ in self.parts())]

    def snapshot(self) -> Any:
        """A copy of the conversation for `put`."""
        return KVCache.from_model(self.model).fork()

    def put(self, snapshot: Any) -> None:
        """Replaces the conversation of the model."""
        KVCache.from_model(self.model).remove(self.model)
        snapshot.fork().install(self.model)

    def is_at(self, snapshot: Any) -> bool:
        """True if the conversation of the model equals a copy."""
        return same_caches(self.snapshot(), snapshot)

    def length(self) -> int:
        """Tokens of the conversation."""
        return KVCache.from_model(self.model).length

    def switched(self) -> int:
        """The number of caches that are wrongly on or off; they are reset."""
        wrong = [attention for attention, on in self._on.items() if attention.use_kv_cache is not on]
        for attention in wrong:
            attention.use_kv_cache = self._on[attention]
        return len(wrong)


@dataclass
class Tally:
    """Results of all tries with one subject."""

    what: str
    tries: int = 0
    interrupted: int = 0
    wrong: int = 0
    """The next call gave something else than the twin's."""
    stuck: int = 0
    """The next call raised."""
    between: int = 0
    """The conversation was neither as before the call nor as after it."""
    switched: int = 0
    """Caches were left on, or off."""
    modes: int = 0
    """A mode of PyTorch (gradients, inference) was left changed: its own contexts do so."""
    first: list[str] = field(default_factory=list)
    """The first failures, for whoever looks for them."""

    @property
    def failures(self) -> dict[str, int]:
        """The number of failures."""
        counts = {name: getattr(self, name) for name in ("wrong", "stuck", "between", "switched")}
        return {name: count for name, count in counts.items() if count}

    def count(self, name: str, detail: object) -> None:
        """Counts a failure."""
        setattr(self, name, getattr(self, name) + 1)
        if len(self.first) < 10:
            self.first.append(f"{name}: try {self.tries}, {detail}")


def run(kind: type[Subject], interrupts: Sequence[Interrupt], what: str = "") -> Tally:
    """One try for each interrupt."""
    tally = Tally(what or kind.__name__)
    with torch.no_grad(), ignoring_swallowed_interrupts():
        subject, twin = kind(), kind()
        for interrupt in interrupts:
            if twin.length() > kind.most_tokens:
                subject.put(subject.start)
                twin.put(twin.start)
            if not attempt(subject, twin, interrupt, tally):
                stage = twin.snapshot()
                subject = kind()
                subject.put(stage)
    return tally


def attempt(subject: Subject, twin: Subject, interrupt: Interrupt, tally: Tally) -> bool:
    """Interrupts one call and runs the next one. False if the subject cannot be used any more."""
    stages = twin.stages()
    tally.tries += 1
    interrupted = interrupt(subject.call)
    tally.interrupted += interrupted
    tally.modes += restore_modes()
    switched = subject.switched()
    if switched:
        tally.count("switched", f"{switched} modules")
    found = next((stage for stage in stages if subject.is_at(stage)), None)
    if found is None or (not interrupted and not subject.is_at(stages[-1])):
        tally.count("between", f"length {subject.length()}")
        return False
    twin.put(found)
    expected = twin.call()
    try:
        result = subject.call()
    except Exception as error:
        tally.count("stuck", f"{type(error).__name__}: {error}")
        return False
    if not same(result, expected) or not subject.is_at(twin.snapshot()):
        tally.count("wrong", f"stage {stages.index(found)} of {len(stages)}")
        return False
    return True


# --- state after an interrupt -----------------------------------------------------------------------------------------


@contextmanager
def ignoring_swallowed_interrupts() -> Iterator[None]:
    """Suppresses the message that Python prints when it swallows an interrupt inside a destructor."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda raised: None if raised.exc_type is KeyboardInterrupt else before(raised)
    try:
        yield
    finally:
        sys.unraisablehook = before


def restore_modes() -> bool:
    """Resets modes that PyTorch's own contexts left on, gradients too; True if there were any."""
    left = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    torch.set_grad_enabled(False)
    if torch.is_inference_mode_enabled():
        # A context that is never left: the lost context cannot be closed.
        _ENTERED.append(torch.inference_mode(False))
        _ENTERED[-1].__enter__()
    return left


_ENTERED: list[torch.inference_mode] = []


# --- comparing ------------------------------------------------------------------------------------------------------


def same(result: Any, expected: Any) -> bool:
    """True if two results are equal: tensors, lists of tensors, or plain values."""
    if isinstance(result, Tensor) and isinstance(expected, Tensor):
        return result.shape == expected.shape and torch.allclose(result, expected, rtol=0, atol=TOLERANCE)
    if isinstance(result, list) and isinstance(expected, list):
        return len(result) == len(expected) and all(map(same, result, expected))
    return bool(result == expected)


def same_caches(one: KVCache, other: KVCache) -> bool:
    """True if all layers have the same tokens in the same rows."""

    def of(cache: KVCache) -> dict[str, list[Tensor]]:
        begun = {path: layer for path, layer in cache.layers.items() if layer.length}
        return {path: [layer.lengths, layer["key"], layer["value"]] for path, layer in begun.items()}

    ours, theirs = of(one), of(other)
    return ours.keys() == theirs.keys() and all(same(ours[path], theirs[path]) for path in ours)
