"""Random programs of calls over several conversations of one module, with their invariants.

What else can be done with a conversation is added in test_machines.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from tests.cache.subjects import Cache, Subject
from tests.conversations import assert_same
from tests.faults.inject import ERRORS, Injected
from tests.internals import truncated_aside
from tests.oracle_operations import EditableConversation
from tests.setups import tokens
from transformer import KVCache, LayerCache
from transformer.errors import CacheFullError

LONGEST, WIDEST, MAX_CONVERSATIONS = 6, 4, 4
WAYS = st.sampled_from(["no_grad", "no_grad", "inference", "grad"])
RECORDING = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
WHICH = st.integers(0, MAX_CONVERSATIONS - 1)
PATTERNS = st.none() | st.none() | st.integers(0, 2 ** (LONGEST * WIDEST) - 1)


@dataclass
class Conversation:
    """One conversation: the library's, and the oracle's of every layer."""

    cache: Cache
    layers: list[EditableConversation]
    source: Tensor
    bound: float = 1e-9


class Stop(Exception):  # noqa: N818
    """Ends a transaction."""


class Said(RuleBasedStateMachine):
    """Several conversations with one module; what each of them holds is compared after every rule."""

    subject: Subject

    def begin(self, subject: Subject, batch: int, length: int) -> None:
        """One conversation, which opens with so many tokens."""
        self.subject, self.count = subject, 0
        self.conversations = [Conversation(subject.empty(), subject.layers, tokens(1, 3, 16, seed=99))]
        self.say(0, batch, length, None, None, "no_grad")

    def pick(self, which: int) -> Conversation:
        return self.conversations[which % len(self.conversations)]

    def drawn(self, *shape: int) -> Tensor:
        self.count += 1
        return tokens(*shape, seed=self.count)

    # --- what is said ---------------------------------------------------------------------------------------------

    @rule(
        which=WHICH,
        batch=st.integers(1, 3),
        length=st.integers(0, LONGEST),
        pattern=PATTERNS,
        mode=st.sampled_from([None, None, True, False]),
        way=WAYS,
    )
    def say(self, which: int, batch: int, length: int, pattern: int | None, mode: bool | None, way: str) -> None:
        """A chunk, with padding where `pattern` says so; one that would hold too much is refused."""
        conversation = self.pick(which)
        x = self.begun(conversation, batch, length)
        mask = None if pattern is None else bits(pattern, x.shape[0], length)
        layers = [layer.forked() for layer in conversation.layers]
        expected = self.subject.expected(layers, x, mask, mode, conversation.source)
        with RECORDING[way](), self.subject.inside(conversation.cache):
            if self.over_the_limit(layers):
                with pytest.raises(CacheFullError):
                    self.subject.run(x, mask, mode, conversation.source)
                return
            out = self.subject.run(x, mask, mode, conversation.source)
        assert_same(out.detach(), expected, atol=conversation.bound)
        conversation.layers = layers

    def begun(self, conversation: Conversation, batch: int, length: int) -> Tensor:
        """The next tokens; a conversation without rows gets some, and a source for them."""
        rows = conversation.cache.batch
        if rows is None:
            assert not any(layer.lengths and max(layer.lengths) for layer in conversation.layers)
            conversation.layers = [layer.cleared() for layer in conversation.layers]
            rows, conversation.source = batch, self.drawn(batch, 3, 16)
        return self.drawn(rows, length, 16)

    def over_the_limit(self, layers: list[EditableConversation]) -> bool:
        each = zip(layers, self.subject.limits, strict=True)
        return any(limit is not None and max(layer.cached_lengths, default=0) > limit for layer, limit in each)

    @rule(which=WHICH)
    def change_the_source(self, which: int) -> None:
        """In place: under all forks that read it."""
        self.pick(which).source.add_(0.25)

    @rule(which=WHICH, first=st.integers(0, 2), back=st.integers(0, LONGEST), length=st.integers(1, LONGEST), way=WAYS)
    def fail(self, which: int, first: int, back: int, length: int, way: str) -> None:
        """Tokens, a truncation below the beginning of the transaction, and other tokens in a transaction that then
        fails: all of it is undone."""
        conversation = self.pick(which)
        if conversation.cache.batch is None or any(self.subject.limits):
            return
        said, x = self.drawn(conversation.cache.batch, first, 16), self.drawn(conversation.cache.batch, length, 16)
        layers = [layer.forked() for layer in conversation.layers]
        self.subject.expected(layers, said, None, None, conversation.source)
        oldest = max(layer.oldest for layer in layers)

        def guess() -> None:
            with KVCache.from_model(self.subject.module).transaction():
                self.subject.run(said, None, None, conversation.source)
                conversation.cache.truncate(max(conversation.cache.length - back, oldest))
                self.subject.run(x, None, None, conversation.source)
                raise Stop

        with self.subject.inside(conversation.cache), RECORDING[way](), pytest.raises(Stop):
            guess()

    @rule(which=WHICH, length=st.integers(1, LONGEST), pattern=PATTERNS, at=st.integers(0, 80), way=WAYS)
    def break_off(self, which: int, length: int, pattern: int | None, at: int, way: str) -> None:
        """A call that fails at one of its operations, with a torn write: nothing of it is left, and no NaN is read."""
        conversation = self.pick(which)
        if conversation.cache.batch is None or any(self.subject.limits):
            return
        x = self.drawn(conversation.cache.batch, length, 16)
        mask = None if pattern is None else bits(pattern, x.shape[0], length)
        layers = [layer.forked() for layer in conversation.layers]
        self.subject.expected(layers, x, mask, None, conversation.source)
        with RECORDING[way](), self.subject.inside(conversation.cache):
            try:
                with Injected(at):
                    self.subject.run(x, mask, None, conversation.source)
            except tuple(ERRORS) as error:
                if "injected" not in str(error):
                    raise
            else:
                conversation.layers = layers

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def everybody_holds_what_he_should(self) -> None:
        """Forks included, after any of them continued."""
        for conversation in self.conversations:
            batch = conversation.cache.batch
            lengths, cached_lengths = (
                conversation.layers[0].lengths,
                [layer.cached_lengths for layer in conversation.layers],
            )
            assert conversation.cache.length == max(lengths, default=0)
            assert conversation.cache.cached_length == max(
                (max(cached, default=0) for cached in cached_lengths), default=0
            )
            if batch is not None:
                most = [max(numbers) for numbers in zip(*cached_lengths, strict=True)] or [0] * batch
                assert conversation.cache.lengths.tolist() == (lengths or [0] * batch)
                assert conversation.cache.cached_lengths.tolist() == most
            if conversation.cache.length and conversation.cache.nbytes == 0:
                continue  # elsewhere: it is what comes next that brings it back
            for part, layer in zip(self.subject.parts(conversation.cache), conversation.layers, strict=True):
                if layer.lengths and max(layer.lengths):
                    assert part["key"].shape == part["value"].shape
                    assert_same(part["value"].detach(), layer.held_values(), atol=conversation.bound)
                    assert part.nbytes_used <= part.nbytes
                    self.can_be_taken_back(part, layer, conversation.bound)

    def can_be_taken_back(self, part: LayerCache, layer: EditableConversation, bound: float) -> None:
        """As far as is promised, on a fork of the cache, after any operation since."""
        before = truncated_aside(part, layer.oldest)
        if layer.oldest:
            assert_same(before["value"].detach(), layer.truncated(layer.oldest).held_values(), atol=bound)


def bits(pattern: int, batch: int, length: int) -> Tensor:
    """bool [batch, length] with the lowest bits of a number."""
    lowest = [bool(pattern >> place & 1) for place in range(batch * length)]
    return torch.tensor(lowest, dtype=torch.bool).view(batch, length)
