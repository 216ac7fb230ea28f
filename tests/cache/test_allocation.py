"""Planned memory, compared with allocated memory: `nbytes` after each call of each split."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.storages import alive_since
from transformer import GroupQueryAttention, KVCache, MultiHeadAttention, MultiQueryAttention, cache_bytes
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock, FeedForward, RMSNorm
from transformer.cache import CacheSpec, LayerPlan
from transformer.errors import ArgumentError

CUTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
WINDOWS = st.sampled_from([(None, 0), (1, 0), (1, 2), (5, 0), (16, 3), (40, 1), (90, 0)])


def attention(
    window: int | None, sinks: int, dtype: torch.dtype = torch.float32, **options: int
) -> GroupQueryAttention:
    return GroupQueryAttention(8, 4, 2, True, True, window_size=window, num_sinks=sinks, dtype=dtype, **options)


def nbytes(module: nn.Module) -> int:
    return KVCache.from_model(module).nbytes


@settings(max_examples=30)
@given(CUTS, WINDOWS, st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_with_a_maximum_it_is_what_is_allocated(
    cut: list[int], memory: tuple[int | None, int], batch: int, dtype: torch.dtype, snug: bool
) -> None:
    """To the byte, from the first token on; `snug`: the smallest maximum that there may be."""
    window, sinks = memory
    smallest = sum(cut) if window is None else window + sinks
    module = attention(window, sinks, dtype, max_cache_length=smallest if snug else 450)
    assert cache_bytes(module, batch, 0) == 0
    seen = 0
    for length in cut:
        seen += length
        expected = cache_bytes(module, batch, seen)
        with torch.no_grad():
            module(torch.randn(batch, length, 8, dtype=dtype))
        assert nbytes(module) == expected


@settings(max_examples=40)
@given(CUTS, WINDOWS, st.integers(1, 3), st.lists(st.booleans(), min_size=6, max_size=6), st.data())
def test_without_a_maximum_it_is_never_exceeded(
    cut: list[int], memory: tuple[int | None, int], batch: int, recorded: list[bool], data: st.DataObject
) -> None:
    """With padding, with recorded gradients in between, and with truncated calls."""
    module, seen = attention(*memory), 0
    for length, grad in zip(cut, recorded, strict=False):
        mask = data.draw(st.sampled_from([None, torch.arange(length) >= length // 2]))
        mask = None if mask is None else torch.stack([mask, *[torch.ones(length, dtype=torch.bool)] * (batch - 1)])
        seen += length
        with torch.set_grad_enabled(grad):
            module(torch.randn(batch, length, 8), attention_mask=mask)
        assert nbytes(module) <= cache_bytes(module, batch, seen)
        if data.draw(st.booleans()) and length <= (module.window_size or length):
            cache = module.kv_cache.fork()
            module.kv_cache = cache.truncate(cache.length - length)
            with torch.no_grad():
                module(torch.randn(batch, 1, 8))
            assert nbytes(module) <= cache_bytes(module, batch, seen)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 64, 65, 66, 67, 100, 200])
@pytest.mark.parametrize("window", [None, 1, 2, 66, 70, 200])
@torch.no_grad()
def test_some_cut_comes_to_it(length: int, window: int | None) -> None:
    cuts = [[length], [1] * length]
    if length > 65:
        cuts.append([length - 65, *[1] * 65])
    most = 0
    for cut in cuts:
        module = attention(window, 0)
        for tokens in cut:
            module(torch.randn(1, tokens, 8))
        most = max(most, nbytes(module))
    assert most == cache_bytes(module, 1, length)


@pytest.mark.parametrize("window", [None, 150])
def test_the_growth_rule_by_every_cut_there_is(window: int | None) -> None:
    """Every capacity that can be there after n tokens, for all 2^(n - 1) ways to cut them; up to a window's length."""
    spec = CacheSpec(2, 2, window_size=window)
    reached: list[set[int]] = [{0}]
    for length in range(1, 150):
        before = set.union(*reached)
        grown = {spec.room(length, capacity, window) for capacity in before if capacity < length}
        # Whatever was there and is large enough stays; buffers only grow.
        reached.append(grown | {capacity for capacity in before if capacity >= length})
        assert max(reached[-1]) == spec.most_room(length)


def decoder(**options: int) -> nn.Module:
    """Encoder without a cache, and a decoder of mixed layers of which two read it, once by a module that they share."""
    shared = MultiQueryAttention(16, 4, use_kv_cache=True, kv_dim=8)
    full = partial(MultiHeadAttention, 16, 4, True, True, **options)
    sliding = partial(MultiQueryAttention, 16, 4, True, True, window_size=5, num_sinks=2, **options)
    block = partial(DecoderBlock, feed_forward=FeedForward(16, 8), norm=RMSNorm)
    encoder = BlockStack([EncoderBlock(MultiHeadAttention(8, 2), FeedForward(8, 8), RMSNorm)], RMSNorm(8))
    blocks = [block(full(), cross_attention=shared), block(sliding()), block(full(), cross_attention=shared)]
    own = GroupQueryAttention(16, 4, 2, use_kv_cache=True, kv_dim=8, **options)
    blocks.append(block(sliding(), cross_attention=own))
    return nn.ModuleDict({"encoder": encoder, "decoder": nn.ModuleList(blocks)})


def feed(model: nn.Module, x: torch.Tensor, source: torch.Tensor) -> None:
    for block in model["decoder"]:
        x = block(x, source if block.readers() else None)


@pytest.mark.parametrize("source_length", [1, 9])
@torch.no_grad()
def test_a_whole_model_with_what_its_layers_read(source_length: int) -> None:
    model, x = decoder(max_cache_length=30), torch.randn(3, 20, 16)
    source = model["encoder"](torch.randn(3, source_length, 8))
    for seen in range(1, 5):
        expected = cache_bytes(model, 3, seen, source_length)
        with alive_since() as grown:
            feed(model, x[:, :1], source)
        if seen == 1:
            assert grown.bytes == expected
        assert nbytes(model) == expected
    growing = decoder()
    feed(growing, x, source)
    assert nbytes(growing) <= cache_bytes(growing, 3, 20, source_length)


@torch.no_grad()
def test_modules_without_a_cache_keep_nothing() -> None:
    module = attention(None, 0)
    module.use_kv_cache = False
    assert cache_bytes(module, 2, 100) == 0


def test_what_lists_its_layers_needs_no_module() -> None:
    """The same numbers for a configuration as for the model that it describes."""

    class Config:
        def layer_plans(self) -> list[LayerPlan]:
            full = LayerPlan(4, 4, torch.float32, max_length=30)
            sliding = LayerPlan(1, 4, torch.float32, window_size=5, num_sinks=2, max_length=30)
            reads = [LayerPlan(groups, 4, torch.float32, kind="cross") for groups in (1, 2)]
            return [full, sliding, full, sliding, *reads]

    assert cache_bytes(Config(), 3, 20, 9) == cache_bytes(decoder(max_cache_length=30), 3, 20, 9)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (attention(None, 0), (0, 1), r"^batch: expected a whole number of at least 1, got 0"),
        (attention(None, 0), (True, 1), r"^batch: .*got True"),
        (attention(None, 0), (1, -1), r"^length: expected a whole number of at least 0, got -1"),
        (attention(None, 0), (1, 2.0), r"^length: .*got 2\.0"),
        (attention(None, 0), (1, 1, -1), r"^source_length: expected a whole number"),
        (attention(None, 0, max_cache_length=8), (1, 9), r"^length: expected at most 8, .*got 9"),
        (decoder(), (1, 1), r"^source_length: expected a number, as the model reads a source, got None"),
        (nn.Linear(2, 2), (1, 1), r"^model: expected one with attention modules"),
        (object(), (1, 1), r"^model: expected a module, or what lists its layer_plans\(\), got object"),
    ],
)
def test_what_cannot_be_worked_out_is_refused(model: object, given: tuple[int, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        cache_bytes(model, *given)


@pytest.mark.parametrize("window", [None, 33])
def test_more_tokens_never_take_less(window: int | None) -> None:
    needs = [cache_bytes(attention(window, 0), 1, length) for length in range(200)]
    assert needs == sorted(needs)
