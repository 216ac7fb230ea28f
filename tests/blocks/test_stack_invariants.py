"""Invariants of a whole stack: any split equals one shot, rows are independent, modes can change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.blocks.stacks import Layer, cache_snapshots, make, run_chunks
from tests.conversations import NAN, assert_same
from tests.setups import SCHEMES, fill, padding, tokens
from transformer.blocks import BlockStack
from transformer.kernels import tuned
from transformer.positions import LearnedPositions, SinusoidalPositions

WINDOWED = (Layer(1, groups=2), Layer(2, groups=1), Layer(5, groups=4))
"""Where every layer has a window, sliding means the same with and without a cache."""

SLIDING_SLIDING_FULL = {
    "1 1 full": (Layer(1, groups=2), Layer(1, groups=1), Layer(None, groups=4)),
    "2 2 full 2": (Layer(2, groups=4), Layer(2, groups=2), Layer(None, groups=1), Layer(2, groups=1)),
    "5 5 full": (Layer(5, groups=1), Layer(5, groups=4), Layer(None, groups=2)),
    "1 2 full 5": (Layer(1), Layer(2, groups=2), Layer(None, groups=1), Layer(5)),
    "2 full 5, sinks": (Layer(2, 2, groups=2), Layer(None), Layer(5, 1, groups=1)),
    "reads": (Layer(2, groups=2, reads=True), Layer(2, groups=4), Layer(None, groups=1, reads=True)),
    "windowed": WINDOWED,
    "windowed, sinks": tuple(replace(layer, sinks=2) for layer in WINDOWED),
}
PLACEMENTS = ("before", "after", "both")
LAYERS = st.sampled_from(sorted(SLIDING_SLIDING_FULL))
SCHEME_NAMES = st.sampled_from(sorted(SCHEMES))


def encoded(batch: int = 3) -> dict:
    """What an encoder stack makes of a padded source, and its mask: two layers, one of which sees its neighbours."""
    encoder = make((Layer(), Layer(2, groups=1)), cached=False, causal=False)
    mask = padding([(0, 5), (1, 2), (2, 3)][:batch], 5)
    with torch.no_grad():
        return {"source": encoder(tokens(batch, 5, 16, seed=9), attention_mask=mask), "source_mask": mask}


def source_for(layers: Sequence[Layer], batch: int = 3) -> dict:
    return encoded(batch) if any(layer.reads for layer in layers) else {}


def shown(out: Tensor, mask: Tensor | None) -> Tensor:
    """The outputs of real tokens; those at padding are undefined."""
    return out if mask is None else out.masked_fill(~mask[..., None], 0.0)


@st.composite
def masks(draw: Callable, length: int, rows: int = 3) -> Tensor:
    starts = [draw(st.integers(0, length)) for _ in range(rows)]
    return padding([(start, draw(st.integers(0, length - start))) for start in starts], length)


@st.composite
def splits(draw: Callable, length: int) -> list[int]:
    edges = [0, *sorted(draw(st.lists(st.integers(0, length), max_size=6))), length]
    return [after - before for before, after in pairwise(edges)]


@pytest.mark.slow
@settings(max_examples=100)
@given(st.data(), LAYERS, SCHEME_NAMES, st.sampled_from(PLACEMENTS), st.integers(1, 14), st.booleans(), st.booleans())
def test_any_split_is_one_shot(
    data: st.DataObject, name: str, scheme: str, placement: str, length: int, padded: bool, grad: bool
) -> None:
    """Issues: litgpt#2182, executorch#21857, hnet#20, nanochat#452. A chunk longer than a window, or decoding that
    ignores the window, in one layer of several would show in the outputs of those above."""
    layers = SLIDING_SLIDING_FULL[name]
    modes = (None, True, False) if name.startswith("windowed") else (None, True)
    mode = data.draw(st.sampled_from(modes))
    mask = data.draw(masks(length)) if padded else None
    source, x = source_for(layers), tokens(3, length, 16)
    cached, plain = (make(layers, scheme, placement=placement, cached=cached) for cached in (True, False))
    with torch.set_grad_enabled(grad):
        whole = plain(x, expanding_context=mode, attention_mask=mask, **source)
        split = run_chunks(cached, x, data.draw(splits(length)), mode, mask, **source)
    assert_same(shown(split, mask), shown(whole, mask))


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data(), LAYERS, st.sampled_from(PLACEMENTS), st.booleans())
def test_modes_may_change_between_calls(data: st.DataObject, name: str, placement: str, grad: bool) -> None:
    """The same calls, each split again: evicted tokens are gone in both, and cached tokens stay."""
    layers = SLIDING_SLIDING_FULL[name]
    stack, other = make(layers, placement=placement), make(layers, placement=placement)
    source = source_for(layers, 2)
    with torch.set_grad_enabled(grad):
        for step in range(data.draw(st.integers(1, 5))):
            # Sliding without a window takes the first chunk's length: there the two would have other windows.
            modes = (None, True, False) if name.startswith("windowed") or step else (None, True)
            length, mode = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(modes))
            x = tokens(2, length, 16, seed=step)
            expected = stack(x, expanding_context=mode, **source)
            assert_same(run_chunks(other, x, data.draw(splits(length)), mode, **source), expected)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data(), LAYERS, SCHEME_NAMES, st.booleans())
def test_a_row_of_a_padded_batch_is_that_row_alone(data: st.DataObject, name: str, scheme: str, grad: bool) -> None:
    layers, batch = SLIDING_SLIDING_FULL[name], 3
    stack, alone = make(layers, scheme), [make(layers, scheme) for _ in range(batch)]
    source = source_for(layers)
    with torch.set_grad_enabled(grad):
        for step in range(data.draw(st.integers(1, 4))):
            length = data.draw(st.sampled_from((1, 2, 5)))
            mask = data.draw(masks(length))
            x = tokens(batch, length, 16, seed=step)
            with tuned(min_row_tokens=data.draw(st.sampled_from((0, 16)))):
                out = stack(x, attention_mask=mask, **source)
            for row, real in enumerate(mask):
                own = {key: tensor[row : row + 1] for key, tensor in source.items()}
                assert_same(out[row, real], alone[row](x[row : row + 1, real], **own)[0])


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("scheme", ["rotary halves", "t5 causal"])
@pytest.mark.parametrize("name", SLIDING_SLIDING_FULL)
def test_neighbours_and_padding_change_no_bit(name: str, scheme: str, placement: str) -> None:
    """Other tokens in the other rows, NaN in one of them, NaN in the padding of `x` and of the source: the outputs and
    caches of the unchanged rows are equal bit by bit."""
    layers = SLIDING_SLIDING_FULL[name]
    clean, other, spoiled = (make(layers, scheme, placement=placement) for _ in range(3))
    source = source_for(layers)
    hidden = {
        key: tensor if key == "source_mask" else tensor.masked_fill(~source["source_mask"][..., None], NAN)
        for key, tensor in source.items()
    }
    with torch.no_grad():
        for step, spans in enumerate(([(0, 4), (2, 2), (1, 2)], [(0, 0), (0, 3), (3, 1)], [(1, 3), (0, 4), (0, 0)])):
            x, mask = tokens(3, 4, 16, seed=step), padding(spans, 4)
            out = clean(x, attention_mask=mask, **source)
            poisoned = x.masked_fill(~mask[..., None], NAN)
            assert torch.equal(shown(spoiled(poisoned, attention_mask=mask, **hidden), mask), shown(out, mask))
            changed = x.clone()
            changed[1] = NAN if step == 1 else -changed[1]
            different = other(changed, attention_mask=mask, **source)
            assert torch.equal(shown(different, mask)[[0, 2]], shown(out, mask)[[0, 2]])
        x = tokens(3, 1, 16, seed=9)
        out = clean(x, **source)
        assert torch.equal(spoiled(x, **hidden), out)
        assert torch.equal(other(x, **source)[[0, 2]], out[[0, 2]])
    if not source:
        assert cache_snapshots(spoiled) == cache_snapshots(clean)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
@settings(max_examples=25)
@given(data=st.data(), length=st.integers(1, 12), padded=st.booleans())
def test_absolute_positions_before_a_stack(kind: str, data: st.DataObject, length: int, padded: bool) -> None:
    """They count with the steps of the stack, so that a split is one shot, and each row counts by itself."""
    layers = SLIDING_SLIDING_FULL["2 full 5, sinks"]
    positions = LearnedPositions(12, 16) if kind == "learned" else SinusoidalPositions(16)
    fill(positions, 5)
    positions.double()

    def placed(stack: BlockStack, x: Tensor, mask: Tensor | None) -> Tensor:
        steps = stack.plan(x, attention_mask=mask)
        return stack(positions(x, steps[0]), steps=steps)

    x, mask = tokens(3, length, 16), data.draw(masks(length)) if padded else None
    cached, plain = make(layers, "none"), make(layers, "none", cached=False)
    with torch.no_grad():
        whole, start, outputs = placed(plain, x, mask), 0, []
        for size in data.draw(splits(length)):
            own = slice(start, start + size)
            outputs.append(placed(cached, x[:, own], None if mask is None else mask[:, own]))
            start += size
        assert_same(shown(torch.cat(outputs, 1), mask), shown(whole, mask))
        if mask is not None:
            for row, real in enumerate(mask):
                own = placed(make(layers, "none"), x[row : row + 1, real], None)
                assert_same(whole[row, real], own[0])
        # And positions do count: the same tokens in another order are another answer.
        if length > 1 and mask is None:
            assert not torch.allclose(placed(make(layers, "none"), x.flip(1), None).flip(1), whole)
