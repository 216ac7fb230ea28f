"""Tour, first part: what one attention module sees. Read it from top to bottom; `pytest -m tour` runs it."""

from __future__ import annotations

import pytest
import torch

from tests.tour.modules import D, E, G, H, attention, same, tokens
from transformer import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.positions import ALiBi

pytestmark = pytest.mark.tour

WINDOW = {"window_size": 3}


@pytest.mark.parametrize("options", [{}, {"position": ALiBi(H)}, WINDOW, {**WINDOW, "num_sinks": 2}])
def test_any_split_is_one_shot(options: dict) -> None:
    """A sequence gives the same outputs in one call without a cache and in any number of calls with one."""
    x = tokens(2, 10)
    whole = attention(cached=False, **options)(x)
    for lengths in ([10], [1] * 10, [4, 1, 5], [9, 1]):
        module = attention(**options)
        same(torch.cat([module(chunk) for chunk in x.split(lengths, dim=1)], dim=1), whole)


def test_a_window_counts_the_query_itself() -> None:
    """With a window of 3 a query sees itself and two tokens before it, and so many tokens stay in the cache."""
    module, x = attention(window_size=3), tokens(1, 8)
    _, weights = module(x, return_weights=True)
    assert (weights[0, 0] > 0).sum(-1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
    assert (module.kv_cache.length, module.kv_cache.cached_length) == (8, 3)


def test_sinks_stay_in_sight() -> None:
    """The first `num_sinks` tokens are visible, and cached, in addition to the window."""
    module, x = attention(window_size=3, num_sinks=2), tokens(1, 8)
    _, weights = module(x, return_weights=True)
    assert weights[0, 0, 7].nonzero().flatten().tolist() == [0, 1, 5, 6, 7]
    assert module.kv_cache.cached_length == 2 + 3


def test_the_mode_may_change_from_call_to_call() -> None:
    """True expands, False slides, None follows the module. Evicted tokens do not come back."""
    module = attention(window_size=3)
    cached = []
    for mode in (True, None, True):
        module(tokens(1, 4), expanding_context=mode)
        cached.append(module.kv_cache.cached_length)
    assert cached == [4, 3, 7]


def test_padding_has_no_influence() -> None:
    """A padded token takes no position, enters no cache and has no influence; its own output is 0."""
    x, mask = tokens(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    module = attention()
    out = module(x, attention_mask=mask)
    same(out[0, 2:], attention()(x[:1, 2:])[0])
    assert not out[0, :2].any()
    assert module.kv_cache.lengths.tolist() == [3, 5]


def test_each_row_has_its_own_length() -> None:
    """Rows may read different numbers of tokens in each call; each is as if it were alone."""
    module, outs, fed = attention(window_size=4), [[], []], [[], []]
    for lengths in ((2, 3), (3, 0), (1, 2), (0, 1)):
        x = tokens(2, 3)
        mask = torch.arange(3) < torch.tensor(lengths).unsqueeze(-1)
        out = module(x, attention_mask=mask)
        for row, length in enumerate(lengths):
            outs[row].append(out[row, :length])
            fed[row].append(x[row, :length])
    assert module.kv_cache.lengths.tolist() == [6, 6]
    for row in range(2):
        alone = attention(cached=False, window_size=4)(torch.cat(fed[row]).unsqueeze(0))
        same(torch.cat(outs[row]), alone[0])


def test_three_modules_are_one() -> None:
    """MHA is GQA with as many groups as heads, MQA is GQA with one group."""
    for kind, groups in ((MultiHeadAttention, H), (MultiQueryAttention, 1)):
        module = kind(E, H, True, True, dtype=torch.float64)
        grouped = GroupQueryAttention(E, H, groups, True, True, dtype=torch.float64)
        grouped.load_state_dict(module.state_dict())
        for _ in range(3):
            x = tokens(2, 3)
            same(module(x), grouped(x))
        assert module.kv_cache["key"].shape == grouped.kv_cache["key"].shape == (2, groups, 9, D)


def reader() -> GroupQueryAttention:
    torch.manual_seed(2)
    return GroupQueryAttention(E, H, G, use_kv_cache=True, dtype=torch.float64)


@torch.no_grad()
def test_a_source_is_projected_once() -> None:
    """Cross-attention keeps the projected source as long as the same one comes in: the same tensor, or an equal one."""
    module, source = reader(), tokens(1, 6)
    module(tokens(1, 1), source)
    kept = module.kv_cache["key"]
    for again in (source, source.clone()):
        module(tokens(1, 1), again)
        assert module.kv_cache["key"].data_ptr() == kept.data_ptr()


@torch.no_grad()
def test_a_source_is_never_stale() -> None:
    """A source that was changed in place, another source, and other weights are all noticed."""
    module, source, x = reader(), tokens(1, 6), tokens(1, 2)
    module(x, source)
    source[0, 3] += 1
    same(module(x, source), reader()(x, source))
    same(module(x, source[:, :4]), reader()(x, source[:, :4]))
    module.k_proj.weight.mul_(2)
    fresh = reader()
    fresh.load_state_dict(module.state_dict())
    same(module(x, source[:, :4]), fresh(x, source[:, :4]))
