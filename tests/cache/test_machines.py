"""Random programs of everything that can be done with conversations, several at a time, against plain lists."""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from tests.blocks.stacks import MIXED, READERS, WITH_SINKS
from tests.cache.subjects import Cache, OneLayer, Subject, WholeModel
from tests.oracle import Options
from tests.oracle_operations import Remembered
from tests.setups import SCHEMES, tokens
from tests.talks import assert_same
from transformer import LayerCache
from transformer.errors import ArgumentError, CacheFullError, CacheStateError

LONGEST, WIDEST, MOST_TALKS = 6, 4, 4
WAYS = st.sampled_from(["no_grad", "no_grad", "inference", "grad"])
RECORDING = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
WHICH = st.integers(0, MOST_TALKS - 1)
LAYERS = st.builds(
    Options,
    num_groups=st.sampled_from([1, 2, 4]),
    window_size=st.none() | st.integers(1, 4),
    scheme=st.sampled_from([SCHEMES[name] for name in ("rotary halves", "alibi", "t5 causal", "none")]),
)


@dataclass
class Talk:
    """One conversation: the library's, and the oracle's of every layer."""

    cache: Cache
    layers: list[Remembered]
    source: Tensor
    bound: float = 1e-9


class Stop(Exception):  # noqa: N818
    """Ends a transaction."""


class Conversations(RuleBasedStateMachine):
    """Several conversations with one module; what each of them holds is compared after every rule."""

    subject: Subject

    def begin(self, subject: Subject) -> None:
        self.subject, self.count = subject, 0
        self.talks = [Talk(subject.empty(), subject.layers, tokens(1, 3, 16, seed=99))]

    def pick(self, which: int) -> Talk:
        return self.talks[which % len(self.talks)]

    def drawn(self, *shape: int) -> Tensor:
        self.count += 1
        return tokens(*shape, seed=self.count)

    # --- what is said ---------------------------------------------------------------------------------------------

    @rule(
        which=WHICH,
        batch=st.integers(1, 3),
        length=st.integers(0, LONGEST),
        pattern=st.none() | st.none() | st.integers(0, 2 ** (LONGEST * WIDEST) - 1),
        mode=st.sampled_from([None, None, True, False]),
        way=WAYS,
    )
    def say(self, which: int, batch: int, length: int, pattern: int | None, mode: bool | None, way: str) -> None:
        """A chunk, with padding where `pattern` says so; one that would hold too much is refused."""
        talk = self.pick(which)
        x = self.begun(talk, batch, length)
        mask = None if pattern is None else bits(pattern, x.shape[0], length)
        layers = [layer.forked() for layer in talk.layers]
        expected = self.subject.expected(layers, x, mask, mode, talk.source)
        with RECORDING[way](), self.subject.inside(talk.cache):
            if self.over_the_limit(layers):
                with pytest.raises(CacheFullError):
                    self.subject.run(x, mask, mode, talk.source)
                return
            out = self.subject.run(x, mask, mode, talk.source)
        assert_same(out.detach(), expected, atol=talk.bound)
        talk.layers = layers

    def begun(self, talk: Talk, batch: int, length: int) -> Tensor:
        """The next tokens; a conversation without rows gets some, and a source for them."""
        rows = talk.cache.batch
        if rows is None:
            assert not any(layer.lengths and max(layer.lengths) for layer in talk.layers)
            talk.layers = [layer.cleared() for layer in talk.layers]
            rows, talk.source = batch, self.drawn(batch, 3, 16)
        return self.drawn(rows, length, 16)

    def over_the_limit(self, layers: list[Remembered]) -> bool:
        each = zip(layers, self.subject.limits, strict=True)
        return any(limit is not None and max(layer.helds, default=0) > limit for layer, limit in each)

    @rule(which=WHICH)
    def change_the_source(self, which: int) -> None:
        """In place: under all forks that read it."""
        self.pick(which).source.add_(0.25)

    @rule(which=WHICH, length=st.integers(1, LONGEST), back=st.integers(0, LONGEST), way=WAYS)
    def fail(self, which: int, length: int, back: int, way: str) -> None:
        """Said, taken back and said again in a transaction that then fails: nothing of it is left."""
        talk = self.pick(which)
        if self.subject.caches is LayerCache or talk.cache.batch is None or any(self.subject.limits):
            return
        x = self.drawn(talk.cache.batch, length, 16)

        def guess() -> None:
            with talk.cache.transaction():
                self.subject.run(x, None, None, talk.source)
                if length <= 2:
                    talk.cache.truncate(max(talk.cache.length - min(back, length), 0))
                    self.subject.run(x, None, None, talk.source)
                raise Stop

        with self.subject.inside(talk.cache), RECORDING[way](), pytest.raises(Stop):
            guess()

    # --- what is done with a conversation ---------------------------------------------------------------------------

    @rule(which=WHICH, back=st.integers(0, LONGEST) | st.integers(0, 30))
    def truncate(self, which: int, back: int) -> None:
        """As far back as is promised; where it is refused further back, the length that it names is the oldest."""
        talk = self.pick(which)
        length = max(talk.cache.length - back, 0)
        try:
            assert talk.cache.truncate(length) is talk.cache
        except CacheStateError as error:
            oldest = int(re.match(r"length: expected at least (\d+)", str(error)).group(1))
            assert length < oldest <= max(layer.oldest for layer in talk.layers)
            with pytest.raises(CacheStateError):
                talk.cache.truncate(oldest - 1)
            talk.cache.truncate(oldest)
            length = oldest
        talk.layers = [layer.truncated(length) for layer in talk.layers]

    @rule(which=WHICH, rows=st.lists(st.integers(0, WIDEST - 1), min_size=1, max_size=WIDEST), way=WAYS)
    def select(self, which: int, rows: list[int], way: str) -> None:
        talk = self.pick(which)
        if talk.cache.batch is None:
            return
        rows = [row % talk.cache.batch for row in rows]
        with RECORDING[way]():
            assert talk.cache.select(rows) is talk.cache
        talk.layers = [layer.selected(rows) for layer in talk.layers]
        with torch.no_grad():
            talk.source = talk.source[rows]

    @rule(which=WHICH, other=WHICH, way=WAYS)
    def join(self, which: int, other: int, way: str) -> None:
        """Of two conversations that both have seen tokens; refused where they slide over different windows."""
        first, second = self.pick(which), self.pick(other)
        if not all(self.has_begun(talk) for talk in (first, second)):
            return
        rows = first.cache.batch + second.cache.batch
        if rows > WIDEST or len(self.talks) == MOST_TALKS:
            return
        pairs = list(zip(first.layers, second.layers, strict=True))
        if any(one.inferred and two.inferred and one.inferred != two.inferred for one, two in pairs):
            with pytest.raises(ArgumentError, match="one window"):
                self.subject.caches.join([first.cache, second.cache])
            return
        with RECORDING[way]():
            joint = self.subject.caches.join([first.cache, second.cache])
        source = torch.cat((first.source, second.source))
        layers = [Remembered.joined(*pair) for pair in pairs]
        self.talks.append(Talk(joint, layers, source, max(first.bound, second.bound)))

    def has_begun(self, talk: Talk) -> bool:
        return all(part is not None and part.batch is not None for part in self.subject.parts(talk.cache))

    @precondition(lambda self: len(self.talks) < MOST_TALKS)
    @rule(which=WHICH, way=WAYS)
    def fork(self, which: int, way: str) -> None:
        talk = self.pick(which)
        with RECORDING[way]():
            fork = talk.cache.fork()
        self.talks.append(replace(talk, cache=fork, layers=[layer.forked() for layer in talk.layers]))

    @precondition(lambda self: len(self.talks) < MOST_TALKS)
    @rule(which=WHICH, length=st.integers(1, 3), back=st.integers(1, 3), by_the_fork=st.booleans())
    def rewrite_beside_a_fork(self, which: int, length: int, back: int, by_the_fork: bool) -> None:
        """Said, forked, taken back and said otherwise by one side: the other one still reads what was said at first."""
        number = which % len(self.talks)
        self.say(number, 1, length, None, None, "no_grad")
        self.fork(number, "no_grad")
        writer = len(self.talks) - 1 if by_the_fork else number
        self.truncate(writer, back)
        self.say(writer, 1, back, None, None, "no_grad")

    @precondition(lambda self: len(self.talks) > 1)
    @rule(which=WHICH)
    def let_go(self, which: int) -> None:
        del self.talks[which % len(self.talks)]

    @rule(which=WHICH)
    def clear(self, which: int) -> None:
        talk = self.pick(which)
        assert talk.cache.clear() is talk.cache
        talk.layers = [layer.cleared() for layer in talk.layers]

    @rule(which=WHICH, tokens_more=st.sampled_from([0, 3, 200]), way=WAYS)
    def reserve(self, which: int, tokens_more: int, way: str) -> None:
        talk = self.pick(which)
        limits = [limit for limit in self.subject.limits if limit is not None]
        parts = [part for part in self.subject.parts(talk.cache) if part is not None]
        with RECORDING[way]():
            if limits and any(part.held + tokens_more > limits[0] for part in parts):
                with pytest.raises(CacheFullError):
                    talk.cache.reserve(tokens_more)
            else:
                assert talk.cache.reserve(tokens_more) is talk.cache

    @rule(which=WHICH)
    def lay_out_for_compiled_steps(self, which: int) -> None:
        talk = self.pick(which)
        if all(self.subject.limits):
            assert talk.cache.freeze_layout() is talk.cache

    @rule(which=WHICH, path=st.sampled_from(["file", "pickle", "deepcopy", "module", "detach"]), way=WAYS)
    def take_a_detour(self, which: int, path: str, way: str) -> None:
        talk = self.pick(which)
        with RECORDING[way]():
            if path == "file":
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder, "talk.safetensors")
                    talk.cache.save(file)
                    talk.cache = self.subject.caches.load(file)
            elif path == "pickle":
                talk.cache = pickle.loads(pickle.dumps(talk.cache))
            elif path == "deepcopy":
                talk.cache = copy.deepcopy(talk.cache)
            elif path == "module":
                talk.cache = self.subject.copied_along(talk.cache)
            else:
                assert talk.cache.detach() is talk.cache

    @rule(which=WHICH, back_at_once=st.booleans(), way=WAYS)
    def move_to_float32_and_back(self, which: int, back_at_once: bool, way: str) -> None:
        talk = self.pick(which)
        with RECORDING[way]():
            if not back_at_once:
                talk.cache.to(dtype=torch.float64)
                return
            assert talk.cache.to(dtype=torch.float32) is talk.cache
            talk.cache.to("cpu", torch.float64)
        talk.bound = 1e-4

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def everybody_holds_what_he_should(self) -> None:
        """Forks included, whoever moved on."""
        for talk in self.talks:
            batch = talk.cache.batch
            lengths, helds = talk.layers[0].lengths, [layer.helds for layer in talk.layers]
            assert talk.cache.length == max(lengths, default=0)
            assert talk.cache.held == max((max(held, default=0) for held in helds), default=0)
            if batch is not None:
                most = [max(numbers) for numbers in zip(*helds, strict=True)] or [0] * batch
                assert talk.cache.lengths.tolist() == (lengths or [0] * batch)
                assert talk.cache.helds.tolist() == most
            for part, layer in zip(self.subject.parts(talk.cache), talk.layers, strict=True):
                if layer.lengths and max(layer.lengths):
                    assert part["key"].shape == part["value"].shape
                    assert_same(part["value"].detach(), layer.held_values(), atol=talk.bound)
                    assert part.nbytes_used <= part.nbytes


class OfOneLayer(Conversations):
    @initialize(options=LAYERS, sinks=st.integers(0, 2), room=st.none() | st.integers(0, 9))
    def build(self, options: Options, sinks: int, room: int | None) -> None:
        options = replace(options, num_sinks=sinks if options.window_size else 0)
        least = 3 if options.window_size is None else options.window_size + options.num_sinks
        self.begin(OneLayer(options, None if room is None else least + room))


class OfAWholeModel(Conversations):
    @initialize(
        layers=st.sampled_from([MIXED, WITH_SINKS, READERS[:2], READERS]),
        scheme=st.sampled_from(["rotary halves", "alibi", "t5 causal", "none"]),
        room=st.none() | st.none() | st.integers(0, 9),
    )
    def build(self, layers: tuple, scheme: str, room: int | None) -> None:
        self.begin(WholeModel(layers, scheme, None if room is None else 5 + room))


TestOneLayer = pytest.mark.slow(OfOneLayer.TestCase)
TestOneLayer.settings = settings(max_examples=40, stateful_step_count=20)
TestAWholeModel = pytest.mark.slow(OfAWholeModel.TestCase)
TestAWholeModel.settings = settings(max_examples=30, stateful_step_count=20)


def bits(pattern: int, batch: int, length: int) -> Tensor:
    """bool [batch, length] with the lowest bits of a number."""
    lowest = [bool(pattern >> place & 1) for place in range(batch * length)]
    return torch.tensor(lowest, dtype=torch.bool).view(batch, length)
