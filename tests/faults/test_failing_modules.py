"""Hooks that raise in each part of a module: the cache is unchanged, and the repeated call succeeds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conversations import assert_same, cache_snapshot
from tests.faults.inject import HookError, fail, failing
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens
from transformer.errors import CacheStateError, ConcurrentUseError

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj", "q_norm", "k_norm")
KINDS = {"expanding": {}, "sliding": {"window_size": 2}, "sinks": {"window_size": 2, "num_sinks": 1}}


@pytest.mark.slow
@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("name", PARTS)
def test_self_attention(name: str, register: str) -> None:
    """At the first call, in a conversation, over a full window, with ragged rows, and in a chunk longer than the
    window; with and without recorded gradients."""
    for recorded in (False, True):
        for kind in KINDS.values():
            options = Options(qk_norm=True, num_groups=2, scheme=SCHEMES["rotary halves"], **kind)
            module, clean = build(options), build(options)
            with torch.set_grad_enabled(recorded):
                for step, length in enumerate((2, 1, 3, 1, 1)):
                    x = tokens(2, length, 16, seed=step)
                    mask = padding([(0, length), (0, 1)], length) if step == 2 else None
                    before = cache_snapshot(module)
                    with failing(getattr(module, name), register):
                        for _ in range(2):
                            with pytest.raises(HookError):
                                module(x, attention_mask=mask)
                            assert cache_snapshot(module) == before
                    assert_same(module(x, attention_mask=mask), clean(x, attention_mask=mask), atol=1e-12)
                    assert cache_snapshot(module) == cache_snapshot(clean)


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("name", PARTS)
def test_cross_attention(name: str, register: str) -> None:
    """A source that fails to be projected leaves the one that is kept, and the next try projects it."""
    options = Options(qk_norm=True, causal=False)
    module, clean = build(options), build(options)
    with torch.no_grad():
        for step in range(3):
            x, kv = tokens(2, 2, 16, seed=step), tokens(2, 3 + step, 16, seed=10 + step)
            before = cache_snapshot(module)
            with failing(getattr(module, name), register), pytest.raises(HookError):
                module(x, kv)
            assert cache_snapshot(module) == before
            assert_same(module(x, kv), clean(x, kv), atol=1e-12)
            assert cache_snapshot(module) == cache_snapshot(clean)


@pytest.mark.parametrize("name", ["table", "rotate", "bias_for"])
def test_position_schemes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheme is part of the call too, and a step planned before the failure is good for the retry."""
    options = Options(scheme=SCHEMES["alibi" if name == "bias_for" else "rotary halves"], window_size=3, num_sinks=1)
    module, clean = build(options), build(options)
    with torch.no_grad():
        for step, length in enumerate((5, 1, 1, 2)):
            x, before = tokens(1, length, 16, seed=step), cache_snapshot(module)
            plan = module.plan(x)
            with monkeypatch.context() as patch:
                patch.setattr(module.position, name, fail)
                with pytest.raises(HookError):
                    module(x, step=plan)
            assert cache_snapshot(module) == before
            assert_same(module(x, step=plan), clean(x), atol=1e-12)


def stack_call(layers: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    step = layers[0].plan(x)
    for layer in layers:
        x = x + layer(x, step=step)
    return x


def test_a_layer_that_fails_itself_is_unchanged() -> None:
    """Of a stack, the layers before it have moved on; what can be asked of a single module is that the one which failed
    did not, and that it says so when it is called as if it had."""
    layers = [build(Options(), seed=seed) for seed in range(3)]
    with torch.no_grad():
        stack_call(layers, tokens(1, 3, 16))
        with failing(layers[1].v_proj, "register_forward_hook"), pytest.raises(HookError):
            stack_call(layers, tokens(1, 1, 16, seed=1))
        assert [layer.kv_cache.length for layer in layers] == [4, 3, 3]
        with pytest.raises(CacheStateError, match="same tokens"):
            stack_call(layers, tokens(1, 1, 16, seed=2))


def test_a_hook_that_calls_its_own_module_is_refused() -> None:
    """One call at a time, also within one thread; the outer call fails, and the conversation continues."""
    module, clean = build(Options()), build(Options())
    x = tokens(1, 2, 16)
    with torch.no_grad():
        module(x), clean(x)
        before = cache_snapshot(module)
        handle = module.q_proj.register_forward_hook(lambda *_: module(x))
        with pytest.raises(ConcurrentUseError):
            module(x)
        handle.remove()
        assert cache_snapshot(module) == before
        assert torch.equal(module(x), clean(x))
