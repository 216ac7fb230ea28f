"""Bars of caches have the lengths that the caches themselves report."""

import pytest
import torch

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, KVCache, LayerCache, MultiHeadAttention
from transformer.errors import ArgumentError, CacheStateError
from transformer.plots import plot_cache
from transformer.plots.cache import CACHED, EVICTED, SINKS, SOURCE


def parts(ax):
    """For each bar the parts that are not empty: name, first position, tokens."""
    bars = {}
    for container in ax.containers:
        (patch,) = container.patches
        if patch.get_width():
            line = round(patch.get_y() + patch.get_height() / 2)
            bars.setdefault(line, []).append((container.get_label(), patch.get_x(), patch.get_width()))
    return [bars[line] for line in sorted(bars)]


def labels(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


@pytest.fixture
def sliding():
    attention = MultiHeadAttention(8, 2, True, True, window_size=4, num_sinks=2).eval()
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :3] = False
    mask[2, :9] = False
    with torch.no_grad():
        attention(torch.randn(3, 12, 8), attention_mask=mask)
    return attention.kv_cache


def test_parts_of_a_row_stand_in_order_of_position(sliding):
    ax = plot_cache(sliding)
    assert parts(ax) == [
        [(SINKS, 0, 2), (EVICTED, 2, 6), (CACHED, 8, 4)],
        [(SINKS, 0, 2), (EVICTED, 2, 3), (CACHED, 5, 4)],
        [(SINKS, 0, 2), (CACHED, 2, 1)],
    ]
    assert labels(ax) == ["row 0", "row 1", "row 2"]
    assert [text.get_text() for text in ax.texts] == ["12 seen, 6 cached", "9 seen, 6 cached", "3 seen, 3 cached"]
    assert ax.get_xlabel() == "position in the row (tokens)"


def test_bars_follow_the_cache(sliding):
    for operation in (lambda: sliding.select([2, 0]), lambda: sliding.detach()):
        operation()
        cached = [sum(width for name, _, width in bar if name != EVICTED) for bar in parts(plot_cache(sliding))]
        seen = [sum(width for _, _, width in bar) for bar in parts(plot_cache(sliding))]
        assert cached == sliding.cached_lengths.tolist()
        assert seen == sliding.lengths.tolist()


def test_layers_with_the_same_numbers_share_their_bars():
    model = DecoderOnlyTransformer(20, 8, 2, 16, 3, window_size=4, layer_pattern="sliding full sliding")
    model.eval().enable_cache()
    with torch.no_grad():
        model(torch.randint(20, (1, 10)))
    ax = plot_cache(model.kv_cache)
    assert parts(ax) == [[(EVICTED, 0, 6), (CACHED, 6, 4)], [(CACHED, 0, 10)]]
    assert labels(ax) == ["row 0\ndecoder.blocks.0.attention and 1 more", "row 0\ndecoder.blocks.1.attention"]
    assert ax.get_title(loc="left") == "KV cache of 3 layers"


def test_sources_of_cross_attention_have_bars_of_their_own():
    model = EncoderDecoderTransformer(20, 20, 8, 2, 16, 1).eval().enable_cache()
    with torch.no_grad():
        model(torch.randint(20, (1, 7)), torch.randint(20, (1, 3)))
    assert parts(plot_cache(model.kv_cache)) == [[(CACHED, 0, 3)], [(SOURCE, 0, 7)]]


def test_a_cache_that_is_fed_by_hand_is_drawn():
    cache = KVCache(num_layers=2, num_kv_heads=1, head_dim=4)
    cache.update(0, "self", torch.rand(1, 1, 5, 4), torch.rand(1, 1, 5, 4))
    assert parts(plot_cache(cache)) == [[(CACHED, 0, 5)]]


@pytest.mark.parametrize("cache", [None, {"key": torch.rand(1, 1, 1, 1)}, MultiHeadAttention(8, 2)])
def test_what_is_no_cache_is_refused(cache):
    with pytest.raises(ArgumentError, match="cache: expected a LayerCache or a KVCache"):
        plot_cache(cache)


@pytest.mark.parametrize("cache", [LayerCache(1, 4), KVCache(num_layers=2, num_kv_heads=1, head_dim=4)])
def test_an_empty_cache_is_refused(cache):
    with pytest.raises(CacheStateError, match="cache: expected one that has read tokens"):
        plot_cache(cache)
