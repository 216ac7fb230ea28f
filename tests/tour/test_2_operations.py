"""Tour, second part: what can be done with a cache, and what errors and gradients do to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tour.modules import E, attention, same, tokens
from transformer import LayerCache
from transformer.errors import CacheFullError, ShapeError

pytestmark = pytest.mark.tour


@torch.no_grad()
def test_truncate_forgets_the_newest_tokens() -> None:
    """As after a rejected guess; a window is full again afterwards."""
    module, x = attention(window_size=3), tokens(1, 9)
    module(x[:, :6])
    module(tokens(1, 2))
    module.kv_cache.truncate(6)
    same(module(x[:, 6:]), attention(cached=False, window_size=3)(x)[:, 6:])


@torch.no_grad()
def test_fork_continues_one_prompt_in_two_ways() -> None:
    """A fork shares the memory until one side writes."""
    module, prompt, ways = attention(), tokens(1, 4), tokens(2, 3)
    module(prompt)
    first = module.kv_cache
    second = first.fork()
    assert first["key"].data_ptr() == second["key"].data_ptr()
    for cache, way in ((first, ways[:1]), (second, ways[1:])):
        module.kv_cache = cache
        same(module(way), attention(cached=False)(torch.cat((prompt, way), 1))[:, 4:])
    assert first["key"].data_ptr() != second["key"].data_ptr()


@torch.no_grad()
def test_select_reorders_and_repeats_rows() -> None:
    """As for beams, for finished requests, and for several samples of one prompt."""
    module, prompts, x = attention(), tokens(3, 4), tokens(4, 1)
    module(prompts)
    rows = [2, 0, 0, 1]
    module.kv_cache.select(rows)
    same(module(x), attention(cached=False)(torch.cat((prompts[rows], x), 1))[:, 4:])


@torch.no_grad()
def test_join_makes_one_batch_of_several_sequences() -> None:
    """Of any lengths: each row continues as if it were the only one."""
    module, prompts, x = attention(), [tokens(1, length) for length in (5, 1, 3)], tokens(3, 2)
    caches = []
    for prompt in prompts:
        module.kv_cache = None
        module(prompt)
        caches.append(module.kv_cache)
    module.kv_cache = LayerCache.join(caches)
    out = module(x)
    for row, prompt in enumerate(prompts):
        alone = attention(cached=False)(torch.cat((prompt, x[row : row + 1]), 1))
        same(out[row], alone[0, prompt.shape[1] :])


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    """In one atomic file, from which another process continues."""
    module, x = attention(window_size=3, num_sinks=1), tokens(2, 8)
    module(x[:, :6])
    module.kv_cache.save(tmp_path / "cache.safetensors")
    other = attention(window_size=3, num_sinks=1)
    other.kv_cache = LayerCache.load(tmp_path / "cache.safetensors")
    same(other(x[:, 6:]), module(x[:, 6:]))


@torch.no_grad()
def test_a_maximum_is_allocated_once() -> None:
    """`max_cache_length`: the same memory from the first token to the last, and an error beyond."""
    module = attention(max_cache_length=6)
    places = set()
    for _ in range(6):
        module(tokens(1, 1))
        places.add((module.kv_cache["key"].data_ptr(), module.kv_cache.nbytes))
    assert len(places) == 1
    with pytest.raises(CacheFullError, match="max_cache_length"):
        module(tokens(1, 1))


@torch.no_grad()
def test_errors_change_nothing() -> None:
    """A call that raises leaves the cache as it was, and the call that was meant goes through."""
    module, x = attention(), tokens(2, 6)
    module(x[:, :4])
    before = {name: tensor.clone() for name, tensor in module.kv_cache.items()}
    for wrong in (tokens(3, 2), torch.randn(2, 2, E + 1, dtype=torch.float64)):
        with pytest.raises(ShapeError):
            module(wrong)
        assert all(torch.equal(module.kv_cache[name], before[name]) for name in before)
    hook = module.out_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module(x[:, 4:])
    hook.remove()
    same(module(x[:, 4:]), attention(cached=False)(x)[:, 4:])


def test_gradients_flow_through_a_cache() -> None:
    """A loss on a later chunk reaches the inputs of an earlier one; `detach` cuts there."""
    module, plain = attention(), attention(cached=False)
    x = tokens(1, 6).requires_grad_()
    module(x[:, :4])
    module(x[:, 4:]).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    plain(y)[:, 4:].square().sum().backward()
    same(x.grad, y.grad)
    assert x.grad[:, :4].any()

    module.kv_cache = None
    x.grad = None
    module(x[:, :4])
    module.kv_cache.detach()
    module(x[:, 4:]).square().sum().backward()
    assert not x.grad[:, :4].any()


def test_state_is_not_weights() -> None:
    """A cache is no entry of the state dict, and follows its module to another dtype."""
    module = attention()
    names = [*module.state_dict()]
    module(tokens(1, 3))
    assert [*module.state_dict()] == names
    assert module.float().kv_cache["key"].dtype == torch.float32
