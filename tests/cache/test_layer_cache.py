"""Cache of one layer: its readable values and its operations."""

import copy

import pytest
import torch

from transformer import GroupQueryAttention, LayerCache, MultiHeadAttention
from transformer.errors import ArgumentError, ShapeError


def attention(**options: object) -> GroupQueryAttention:
    torch.manual_seed(1)
    return GroupQueryAttention(16, 4, 2, True, True, **options)


def fed(lengths: list[int], **options: object) -> GroupQueryAttention:
    module = attention(**options)
    with torch.no_grad():
        for length in lengths:
            module(torch.randn(2, length, 16))
    return module


def test_a_mapping_of_exactly_two() -> None:
    module = attention()
    assert module.kv_cache is None
    with torch.no_grad():
        module(torch.randn(2, 3, 16))
    cache = module.kv_cache
    assert isinstance(cache, LayerCache)
    assert list(cache) == ["key", "value"]
    assert len(cache) == 2
    assert [tuple(tensor.shape) for tensor in cache.values()] == [(2, 2, 3, 4)] * 2
    assert [name for name, _ in cache.items()] == ["key", "value"]
    with pytest.raises(KeyError):
        cache["keys"]
    assert "length=3, cached_length=3" in repr(cache)


def test_keys_and_values_are_the_projections_in_order() -> None:
    module = attention()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        module(x[:, :2])
        module(x[:, 2:])
        key = module.k_proj(x).view(2, 5, 2, 4).transpose(1, 2)
        value = module.v_proj(x).view(2, 5, 2, 4).transpose(1, 2)
    torch.testing.assert_close(module.kv_cache["key"], key)
    torch.testing.assert_close(module.kv_cache["value"], value)


def test_views_where_rows_are_alike() -> None:
    cache = fed([3, 1]).kv_cache
    assert cache["key"].data_ptr() == cache["key"].data_ptr()
    assert cache["key"].untyped_storage().nbytes() > cache["key"].nbytes


def test_ragged_rows_are_left_aligned_and_zero_filled() -> None:
    module = attention()
    x = torch.randn(2, 4, 16)
    mask = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        module(x, attention_mask=mask)
        key = module.k_proj(x).view(2, 4, 2, 4).transpose(1, 2)
    cache = module.kv_cache
    assert (cache.length, cache.cached_length) == (4, 4)
    assert (cache.lengths.tolist(), cache.cached_lengths.tolist()) == ([1, 4], [1, 4])
    torch.testing.assert_close(cache["key"][0, :, :1], key[0, :, 1:2])
    assert (cache["key"][0, :, 1:] == 0).all()
    torch.testing.assert_close(cache["key"][1], key[1])


def test_sinks_stand_first() -> None:
    module = attention(window_size=3, num_sinks=2)
    x = torch.randn(1, 9, 16)
    with torch.no_grad():
        for chunk in x.split([1, 6, 2], dim=1):
            module(chunk)
        key = module.k_proj(x).view(1, 9, 2, 4).transpose(1, 2)
    assert (module.kv_cache.length, module.kv_cache.cached_length) == (9, 5)
    torch.testing.assert_close(module.kv_cache["key"], key[:, :, [0, 1, 6, 7, 8]])


def test_bytes() -> None:
    cache = fed([5, 1]).kv_cache
    per_token = 2 * 2 * 4 * 4
    assert cache.nbytes_used == 2 * 6 * per_token
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.values()}
    assert cache.nbytes == sum(storages.values())


@torch.no_grad()
def test_truncate_fills_a_window_and_gives_back_no_more() -> None:
    """Tokens beyond the window that expanding calls cached stay evicted after a sliding call."""
    module, x = attention(window_size=3), torch.randn(1, 9, 16)
    module(x[:, :8], expanding_context=True)
    module(x[:, 8:])
    assert module.kv_cache.truncate(8).cached_length == 3
    torch.testing.assert_close(module.kv_cache["value"], module.v_proj(x[:, 5:8]).view(1, 3, 2, 4).transpose(1, 2))


@torch.no_grad()
def test_a_conversation_goes_on_in_another_module() -> None:
    x = torch.randn(2, 6, 16)
    first, second, whole = attention(), attention(), attention()
    first(x[:, :4])
    second.kv_cache = first.kv_cache
    torch.testing.assert_close(second(x[:, 4:]), whole(x)[:, 4:])


@pytest.mark.parametrize("options", [{"head_dim": 2}, {"window_size": 2, "num_sinks": 1}])
def test_a_cache_of_other_heads_or_sinks_is_refused(options: dict) -> None:
    module, other = fed([2]), fed([2], **options)
    before = module.kv_cache
    with pytest.raises(ShapeError, match="kv_cache: expected num_kv_heads"):
        module.kv_cache = other.kv_cache
    with pytest.raises(ArgumentError, match="kv_cache: expected None or"):
        module.kv_cache = {"key": torch.zeros(1), "value": torch.zeros(1)}
    assert module.kv_cache is before


@torch.no_grad()
def test_to_moves_what_is_held() -> None:
    module = fed([3])
    assert module.kv_cache.to(dtype=torch.float64) is module.kv_cache
    assert module.kv_cache["key"].dtype == torch.float64
    module.double()
    assert module(torch.randn(2, 1, 16, dtype=torch.float64)).dtype == torch.float64


def test_copies_are_compact_and_apart() -> None:
    module = fed([40, 1])
    copied = copy.deepcopy(module)
    assert copied.kv_cache.nbytes == module.kv_cache.nbytes_used
    with torch.no_grad():
        copied(torch.randn(2, 3, 16))
    assert (module.kv_cache.length, copied.kv_cache.length) == (41, 44)


def test_a_source_alone_is_what_the_cache_shows() -> None:
    module = MultiHeadAttention(16, 4, use_kv_cache=True)
    with torch.no_grad():
        module(torch.randn(2, 1, 16), kv=torch.randn(2, 7, 16))
    assert module.kv_cache["key"].shape == (2, 4, 7, 4)
    assert module.kv_cache.length == 0
    assert module.kv_cache.nbytes == 2 * 2 * 7 * 16 * 4
