"""Refusals of a call of a stack: all caches stay as they were, so that the corrected call succeeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.blocks.stacks import MIXED, READERS, Layer, cache_snapshots, make
from tests.setups import padding, tokens
from transformer import MultiHeadAttention
from transformer.blocks import BlockStack, EncoderBlock, RMSNorm
from transformer.cache import Step
from transformer.errors import ArgumentError, CacheFullError, CacheStateError, DtypeError, ShapeError

X, SOURCE, MASK = tokens(2, 3, 16, seed=1), tokens(2, 4, 16, seed=2), padding([(0, 3), (1, 2)], 3)


def exchanged(first: Step, second: Step, *others: Step) -> tuple[Step, ...]:
    return second, first, *others


Call = tuple[type, str, Callable[[BlockStack], dict]]

X_REFUSED: dict[str, Call] = {
    "width": (ShapeError, "x: expected", lambda _: {"x": tokens(2, 3, 8)}),
    "rank": (ShapeError, "x: expected", lambda _: {"x": X[0]}),
    "batch": (ShapeError, "x: expected 2 rows", lambda _: {"x": tokens(3, 3, 16)}),
    "dtype": (DtypeError, "x: expected", lambda _: {"x": X.float()}),
    "mask shape": (ShapeError, "attention_mask: expected", lambda _: {"attention_mask": MASK[:, :2]}),
    "mask dtype": (DtypeError, "attention_mask: expected", lambda _: {"attention_mask": MASK.double()}),
}
STEPS_REFUSED: dict[str, Call] = {
    "too few": (ArgumentError, "steps: expected one for each of 3", lambda s: {"steps": s.plan(X)[:2]}),
    "too many": (ArgumentError, "steps: expected one for each of 3", lambda s: {"steps": s.plan(X) * 2}),
    "none": (ArgumentError, "steps: expected one for each of 3", lambda _: {"steps": ()}),
    "a mask": (
        ArgumentError,
        "steps: expected .*=None",
        lambda s: {"steps": s.plan(X), "attention_mask": MASK},
    ),
    "a mode": (
        ArgumentError,
        "steps: expected .*=None",
        lambda s: {"steps": s.plan(X), "expanding_context": True},
    ),
    "False": (
        ArgumentError,
        "steps: expected .*=None",
        lambda s: {"steps": s.plan(X), "expanding_context": False},
    ),
    "other x": (ShapeError, "step: made for", lambda s: {"steps": s.plan(X[:, :2])}),
    "exchanged": (ArgumentError, "step: made for Rule", lambda s: {"steps": exchanged(*s.plan(X))}),
    "reversed": (ArgumentError, "step: made for Rule", lambda s: {"steps": s.plan(X)[::-1]}),
    "all sliding": (ArgumentError, "step: made for Rule", lambda s: {"steps": s.plan(X)[:1] * 3}),
    "all full": (ArgumentError, "step: made for Rule", lambda s: {"steps": s.plan(X)[2:] * 3}),
    "other mode": (ArgumentError, "step: made for Rule", lambda s: {"steps": (s.plan(X, True)[0], *s.plan(X)[2:] * 2)}),
    "stale": (CacheStateError, "step: made for row lengths", lambda _: {"steps": make(MIXED).plan(X)}),
}
SOURCE_REFUSED: dict[str, Call] = {
    "missing": (ArgumentError, "source: expected", lambda _: {"source": None}),
    "mask alone": (ArgumentError, "source: expected", lambda _: {"source": None, "source_mask": torch.ones(2, 4)}),
}
SOURCE_REFUSED_LATE: dict[str, Call] = {
    "width": (ShapeError, "kv: expected", lambda _: {"source": tokens(2, 4, 8)}),
    "rank": (ShapeError, "kv: expected", lambda _: {"source": SOURCE[0]}),
    "batch": (ShapeError, "kv: expected", lambda _: {"source": tokens(3, 4, 16)}),
    "dtype": (DtypeError, "kv: expected", lambda _: {"source": SOURCE.float()}),
    "mask shape": (ShapeError, "kv_mask: expected", lambda _: {"source_mask": torch.ones(2, 3).bool()}),
    "mask dtype": (DtypeError, "kv_mask: expected", lambda _: {"source_mask": torch.ones(2, 4)}),
}


def refused(stack: BlockStack, source: dict, call: Call) -> None:
    """In the middle of a conversation: the error, unchanged caches, and then the right call, as in a stack without the
    wrong one."""
    error, message, arguments = call
    clean = make(READERS if source else MIXED)
    with torch.no_grad():
        for one in (stack, clean):
            one(X, **source)
        before = cache_snapshots(stack)
        for _ in range(2):
            with pytest.raises(error, match=message):
                stack(**{"x": X, **source, **arguments(stack)})
            assert cache_snapshots(stack) == before
        assert torch.equal(stack(X, **source), clean(X, **source))
    assert cache_snapshots(stack) == cache_snapshots(clean)


@pytest.mark.parametrize("wrong", X_REFUSED)
@pytest.mark.parametrize("reads", [False, True], ids=["plain", "readers"])
def test_x_and_its_mask(wrong: str, reads: bool) -> None:
    refused(make(READERS if reads else MIXED), {"source": SOURCE} if reads else {}, X_REFUSED[wrong])


@pytest.mark.parametrize("wrong", STEPS_REFUSED)
def test_steps(wrong: str) -> None:
    refused(make(MIXED), {}, STEPS_REFUSED[wrong])


@pytest.mark.parametrize("wrong", SOURCE_REFUSED)
def test_sources(wrong: str) -> None:
    refused(make(READERS), {"source": SOURCE}, SOURCE_REFUSED[wrong])


@pytest.mark.parametrize("wrong", SOURCE_REFUSED_LATE)
def test_sources_that_do_not_fit(wrong: str) -> None:
    refused(make(READERS), {"source": SOURCE}, SOURCE_REFUSED_LATE[wrong])


@pytest.mark.parametrize("given", [{"source": SOURCE}, {"source_mask": MASK}], ids=["source", "mask"])
def test_a_source_that_no_layer_reads(given: dict) -> None:
    (name,) = given
    refused(make(MIXED), {}, (ArgumentError, f"^{name}: expected None", lambda _: given))


def test_a_full_cache_above_one_that_slides() -> None:
    """Issues: transformers#39593 #35711, torchtune past its limit. A full static cache raised with its length already
    moved: the layer that is full stands above layers that have room."""
    stack, clean = make(MIXED), make(MIXED)
    stack.blocks[2].attention.max_cache_length = 5
    with torch.no_grad():
        for one in (stack, clean):
            one(X)
        before = cache_snapshots(stack)
        for _ in range(2):
            with pytest.raises(CacheFullError, match="max_cache_length"):
                stack(X)
            assert cache_snapshots(stack) == before
        assert torch.equal(stack(X[:, :2]), clean(X[:, :2])), "what still fits goes on"
    assert cache_snapshots(stack) == cache_snapshots(clean)


@pytest.mark.parametrize("behind", range(3))
def test_layers_of_unequal_length(behind: int) -> None:
    """One layer was cleared, or fed by itself: refused before anything changes, naming the two layers."""
    for change in ("cleared", "fed", "row"):
        stack = make(MIXED)
        with torch.no_grad():
            stack(X)
            attention = stack.blocks[behind].attention
            if change == "cleared":
                attention.kv_cache = None
            else:
                attention(X, attention_mask=None if change == "fed" else padding([(0, 3), (0, 0)], 3))
            before = cache_snapshots(stack)
            other = behind or 1
            for call in (stack, stack.plan):
                with pytest.raises(CacheStateError, match=rf"^layers: .* in layer 0 and .* in layer {other}; clear"):
                    call(X)
                assert cache_snapshots(stack) == before
            for block in stack.blocks:
                block.attention.kv_cache = None
            assert torch.equal(stack(X), make(MIXED)(X))


def test_layers_of_which_only_some_have_a_cache() -> None:
    stack = make(MIXED)
    stack.blocks[1].attention.use_kv_cache = False
    with torch.no_grad():
        stack(X)
        before = cache_snapshots(stack)
        with pytest.raises(CacheStateError, match=r"in layer 1; .*use_kv_cache"):
            stack(X)
    assert cache_snapshots(stack) == before


def tied(cached: bool) -> BlockStack:
    """Two blocks with feed-forward networks of their own and one attention module."""
    attention = MultiHeadAttention(16, 4, True, cached).double()
    return BlockStack([EncoderBlock(attention, nn.Linear(16, 16), RMSNorm).double() for _ in range(2)])


def test_a_module_with_a_cache_standing_twice() -> None:
    """It would append the same tokens twice, and so would a block that occurs twice. Without a cache both work."""
    for twice in (tied(True), BlockStack([*make([Layer()]).blocks] * 2)):
        for call in (twice, twice.plan):
            with pytest.raises(ArgumentError, match=r"^layers: expected each module with a kv_cache once, .*layer 1"):
                call(X)
        assert cache_snapshots(twice) == [None]
    free = tied(False)
    x = X
    for block in free.blocks:
        x = block(x)
    assert torch.equal(free(X), x)


def test_layers_whose_own_windows_differ_get_steps_of_their_own() -> None:
    """A window that a layer fixed itself counts as one that it was built with."""
    stack = make([Layer(), Layer()])
    with torch.no_grad():
        for block, window in zip(stack.blocks, (3, 2), strict=True):
            block.attention(tokens(2, window, 16), None, False)
            block.attention(tokens(2, 5 - window, 16), None, False)
        steps = stack.plan(X, False)
        assert [step.rule.window for step in steps] == [3, 2]
        stack(X, expanding_context=False)
    assert [block.attention.kv_cache.cached_length for block in stack.blocks] == [3, 2]
