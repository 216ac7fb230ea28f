"""Random programs of all operations on several conversations, compared with plain lists."""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.blocks.stacks import MIXED, READERS, WITH_SINKS
from tests.cache.machine import LONGEST, MAX_CONVERSATIONS, PATTERNS, RECORDING, WAYS, WHICH, WIDEST, Conversation, Said
from tests.cache.subjects import OneLayer, WholeModel, first_values
from tests.oracle import Options
from tests.oracle_operations import first_value
from tests.setups import SCHEMES
from transformer.cache.policies import AccumulatedAttention, AnyPolicy, LastQueries, Policy
from transformer.codecs import CODECS
from transformer.errors import ArgumentError, CacheFullError, CacheStateError
from transformer.kernels import tuned

LAYERS = st.builds(
    Options,
    num_groups=st.sampled_from([1, 2, 4]),
    window_size=st.none() | st.integers(1, 4),
    scheme=st.sampled_from([SCHEMES[name] for name in ("rotary halves", "alibi", "t5 causal", "none")]),
)
STORED = st.sampled_from([(None, None)] * 4 + [(kind, kind) for kind in CODECS] + [("int8", "int4"), (None, "int8")])
POLICIES = st.sampled_from([first_values, LastQueries(2, 3), AccumulatedAttention(1)])
OPENINGS = st.tuples(st.integers(1, 3), st.integers(0, LONGEST))
ROWS = st.lists(st.integers(0, WIDEST - 1), min_size=1, max_size=WIDEST) | st.sampled_from([[1, 0], [2, 1, 0]])


class Operated(Said):
    """Conversations that are rearranged too."""

    def __init__(self) -> None:
        super().__init__()
        self.folder, self.files = tempfile.TemporaryDirectory(), 0

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(which=WHICH, back=st.integers(0, LONGEST) | st.integers(0, 30))
    def truncate(self, which: int, back: int) -> None:
        """As far back as is promised; where it is refused further back, the length that it names is the oldest."""
        conversation = self.pick(which)
        length = max(conversation.cache.length - back, 0)
        try:
            assert conversation.cache.truncate(length) is conversation.cache
        except CacheStateError as error:
            oldest = int(re.match(r"length: expected at least (\d+)", str(error)).group(1))
            assert length < oldest <= max(layer.oldest for layer in conversation.layers)
            with pytest.raises(CacheStateError):
                conversation.cache.truncate(oldest - 1)
            conversation.cache.truncate(oldest)
            length = oldest
        conversation.layers = [layer.truncated(length) for layer in conversation.layers]

    @rule(which=WHICH, rows=ROWS, way=WAYS)
    def select(self, which: int, rows: list[int], way: str) -> None:
        conversation = self.pick(which)
        if conversation.cache.batch is None:
            return
        rows = [row % conversation.cache.batch for row in rows]
        with RECORDING[way]():
            assert conversation.cache.select(rows) is conversation.cache
        conversation.layers = [layer.selected(rows) for layer in conversation.layers]
        with torch.no_grad():
            conversation.source = conversation.source[rows]

    @rule(which=WHICH, other=WHICH, way=WAYS)
    def join(self, which: int, other: int, way: str) -> None:
        """Of two conversations that both have seen tokens; refused where they slide over different windows."""
        first, second = self.pick(which), self.pick(other)
        if not all(self.has_begun(conversation) for conversation in (first, second)):
            return
        rows = first.cache.batch + second.cache.batch
        if rows > WIDEST or len(self.conversations) == MAX_CONVERSATIONS:
            return
        pairs = list(zip(first.layers, second.layers, strict=True))
        if any(one.inferred and two.inferred and one.inferred != two.inferred for one, two in pairs):
            with pytest.raises(ArgumentError, match="one window"):
                self.subject.caches.join([first.cache, second.cache])
            return
        with RECORDING[way]():
            joint = self.subject.caches.join([first.cache, second.cache])
        source = torch.cat((first.source, second.source))
        layers = [one.joined(two) for one, two in pairs]
        self.conversations.append(Conversation(joint, layers, source, max(first.bound, second.bound)))

    def has_begun(self, conversation: Conversation) -> bool:
        return all(part is not None and part.batch is not None for part in self.subject.parts(conversation.cache))

    @precondition(lambda self: len(self.conversations) < MAX_CONVERSATIONS)
    @rule(which=WHICH, way=WAYS)
    def fork(self, which: int, way: str) -> None:
        conversation = self.pick(which)
        with RECORDING[way]():
            fork = conversation.cache.fork()
        self.conversations.append(
            replace(conversation, cache=fork, layers=[layer.forked() for layer in conversation.layers])
        )

    @precondition(lambda self: len(self.conversations) < MAX_CONVERSATIONS)
    @rule(which=WHICH, length=st.integers(1, 3), back=st.integers(1, 3), by_the_fork=st.booleans())
    def rewrite_beside_a_fork(self, which: int, length: int, back: int, by_the_fork: bool) -> None:
        """One side of a fork is truncated and continued with other tokens: the other side keeps the first tokens."""
        number = which % len(self.conversations)
        self.say(number, 1, length, None, None, "no_grad")
        self.fork(number, "no_grad")
        writer = len(self.conversations) - 1 if by_the_fork else number
        self.truncate(writer, back)
        self.say(writer, 1, back, None, None, "no_grad")

    @rule(
        which=WHICH,
        rows=ROWS,
        lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3),
        pattern=PATTERNS,
        back=st.integers(0, 9),
    )
    def take_samples(self, which: int, rows: list[int], lengths: list[int], pattern: int | None, back: int) -> None:
        """Repeated rows go on with tokens of their own, some of them with none, and are taken back, perhaps into what
        they share."""
        self.say(which, 1, 2, None, True, "no_grad")
        self.select(which, [*rows[: WIDEST - 1], rows[0]], "no_grad")
        for length in lengths:
            self.say(which, 1, length, pattern, True, "no_grad")
        self.truncate(which, back)
        self.say(which, 1, 1, None, True, "inference")

    @precondition(lambda self: len(self.conversations) > 1)
    @rule(which=WHICH)
    def drop(self, which: int) -> None:
        del self.conversations[which % len(self.conversations)]

    @rule(which=WHICH, keep=st.integers(1, 8), way=WAYS)
    def compress(self, which: int, keep: int, way: str) -> None:
        """By a policy that is as simple in plain lists; refused where sinks would leave no room."""
        conversation = self.pick(which)
        sinks = max(layer.options.num_sinks for layer in conversation.layers)
        if keep <= sinks and any(part is not None for part in self.subject.parts(conversation.cache)):
            with pytest.raises(ArgumentError, match="keep"):
                conversation.cache.compress(keep, first_values)
        keep = max(keep, sinks + 1)
        with RECORDING[way]():
            assert conversation.cache.compress(keep, first_values) is conversation.cache
        conversation.layers = [layer.compressed(keep, first_value) for layer in conversation.layers]

    @rule(which=WHICH)
    def clear(self, which: int) -> None:
        conversation = self.pick(which)
        assert conversation.cache.clear() is conversation.cache
        conversation.layers = [layer.cleared() for layer in conversation.layers]

    @rule(which=WHICH, tokens_more=st.sampled_from([0, 3, 200]), way=WAYS)
    def reserve(self, which: int, tokens_more: int, way: str) -> None:
        conversation = self.pick(which)
        limits = [limit for limit in self.subject.limits if limit is not None]
        parts = conversation.cache.parts()
        with RECORDING[way]():
            if limits and any(part.cached_length + tokens_more > limits[0] for part in parts):
                with pytest.raises(CacheFullError):
                    conversation.cache.reserve(tokens_more)
            else:
                assert conversation.cache.reserve(tokens_more) is conversation.cache

    @rule(which=WHICH, length=st.integers(1, 2))
    def make_room_before_a_rejection(self, which: int, length: int) -> None:
        """Tokens that windows have evicted, but still store, are moved too."""
        self.say(which, 1, length, None, None, "no_grad")
        self.reserve(which, 200, "no_grad")
        self.truncate(which, length)

    @rule(which=WHICH)
    def lay_out_for_compiled_steps(self, which: int) -> None:
        """Refused after a compression, until all that it kept is evicted."""
        conversation = self.pick(which)
        if all(self.subject.limits):
            try:
                assert conversation.cache.freeze_layout() is conversation.cache
            except CacheStateError:
                assert any(any(layer.kept) for layer in conversation.layers)

    @rule(which=WHICH, path=st.sampled_from(["file", "pickle", "deepcopy", "module", "detach"]), way=WAYS)
    def take_a_detour(self, which: int, path: str, way: str) -> None:
        conversation = self.pick(which)
        with RECORDING[way]():
            if path == "file":
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder, "conversation.safetensors")
                    conversation.cache.save(file)
                    conversation.cache = self.subject.caches.load(file)
            elif path == "pickle":
                conversation.cache = pickle.loads(pickle.dumps(conversation.cache))
            elif path == "deepcopy":
                conversation.cache = copy.deepcopy(conversation.cache)
            elif path == "module":
                conversation.cache = self.subject.copied_along(conversation.cache)
            else:
                assert conversation.cache.detach() is conversation.cache

    @rule(which=WHICH, way=WAYS)
    def offload(self, which: int, way: str) -> None:
        """To a file of its own, which whatever follows brings back, or nothing does; a graph is cut first."""
        conversation = self.pick(which)
        with RECORDING[way]():
            conversation.cache.detach()
            self.files += 1
            assert conversation.cache.offload(Path(self.folder.name, str(self.files))) is conversation.cache
        assert conversation.cache.nbytes == conversation.cache.nbytes_used == 0

    @rule(which=WHICH, back_at_once=st.booleans(), way=WAYS)
    def move_to_float32_and_back(self, which: int, back_at_once: bool, way: str) -> None:
        conversation = self.pick(which)
        with RECORDING[way]():
            if not back_at_once:
                conversation.cache.to(dtype=torch.float64)
                return
            assert conversation.cache.to(dtype=torch.float32) is conversation.cache
            conversation.cache.to("cpu", torch.float64)
        conversation.bound = 1e-4


def always_kept(policy: AnyPolicy) -> int:
    """How many tokens it leaves no choice about."""
    return policy.always_kept if isinstance(policy, Policy) else 0


class OfOneLayer(Operated):
    @initialize(
        options=LAYERS,
        sinks=st.integers(0, 2),
        stored=STORED,
        room=st.none() | st.integers(0, 9),
        budget=st.none() | st.none() | st.integers(0, 6),
        policy=POLICIES,
        opening=OPENINGS,
    )
    def build(
        self,
        options: Options,
        sinks: int,
        stored: tuple[str | None, str | None],
        room: int | None,
        budget: int | None,
        policy: AnyPolicy,
        opening: tuple[int, int],
    ) -> None:
        """A budget and a limit are not combined: the limit counts tokens that the budget then drops."""
        options = replace(options, num_sinks=sinks if options.window_size else 0, stored=stored)
        least = 3 if options.window_size is None else options.window_size + options.num_sinks
        most = None if budget is None else 1 + options.num_sinks + always_kept(policy) + budget
        within = None if most is None else (most, policy)
        self.begin(OneLayer(options, None if room is None or most else least + room, within), *opening)


class OfObservedRows(Operated):
    """Of a layer whose budget observes queries or weights, which go with their rows."""

    @initialize(options=LAYERS, chosen=st.integers(1, 4), policy=POLICIES, opening=OPENINGS)
    def build(self, options: Options, chosen: int, policy: AnyPolicy, opening: tuple[int, int]) -> None:
        self.begin(OneLayer(options, None, (chosen + always_kept(policy), policy)), *opening)


class OfSamples(Operated):
    """Of layers whose rows may share their tokens in every call that expands."""

    @initialize(
        groups=st.sampled_from([1, 2, 4]),
        scheme=st.sampled_from(["rotary halves", "none"]),
        room=st.none() | st.none() | st.integers(6, 30),
        opening=OPENINGS,
    )
    def build(self, groups: int, scheme: str, room: int | None, opening: tuple[int, int]) -> None:
        self.begin(OneLayer(Options(num_groups=groups, scheme=SCHEMES[scheme]), room), *opening)


class OfAWholeModel(Operated):
    @initialize(
        layers=st.sampled_from([MIXED, WITH_SINKS, READERS[:2], READERS]),
        scheme=st.sampled_from(["rotary halves", "alibi", "t5 causal", "none"]),
        stored=STORED,
        room=st.none() | st.none() | st.integers(0, 9),
        opening=OPENINGS,
    )
    def build(
        self,
        layers: tuple,
        scheme: str,
        stored: tuple[str | None, str | None],
        room: int | None,
        opening: tuple[int, int],
    ) -> None:
        self.begin(WholeModel(layers, scheme, None if room is None else 5 + room, stored), *opening)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """For tensors this small a second one does nothing but wait. Repeated rows share their tokens, however few."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tuned(min_shared_bytes=0):
        yield
    torch.set_num_threads(threads)


TestOneLayer = pytest.mark.slow(OfOneLayer.TestCase)
TestOneLayer.settings = settings(max_examples=60, stateful_step_count=20)
TestObservedRows = pytest.mark.slow(OfObservedRows.TestCase)
TestObservedRows.settings = settings(max_examples=60, stateful_step_count=20)
TestSamples = pytest.mark.slow(OfSamples.TestCase)
TestSamples.settings = settings(max_examples=150, stateful_step_count=20)
TestAWholeModel = pytest.mark.slow(OfAWholeModel.TestCase)
TestAWholeModel.settings = settings(max_examples=50, stateful_step_count=20)
