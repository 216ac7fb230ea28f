"""In-place changes of inputs and outputs: no effect on the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conversations import assert_same, cache_snapshot
from tests.internals import poison_dead_slots
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
KINDS = {"expanding": {}, "sliding": {"window_size": 2}, "sinks": {"window_size": 2, "num_sinks": 2}}


def scribble(*tensors: Tensor | None) -> None:
    with torch.no_grad():
        for tensor in tensors:
            if tensor is not None:
                tensor.detach().fill_(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_self_attention(kind: str, mode: str) -> None:
    """Of equal rows and of rows apart, with and without weights, through short and long chunks."""
    options = Options(num_groups=2, scheme=SCHEMES["rotary halves"], **KINDS[kind])
    module, clean = build(options), build(options)
    with MODES[mode]():
        for step, length in enumerate((1, 4, 1, 2, 5, 1)):
            x = tokens(2, length, 16, seed=step)
            mask = padding([(0, length), (0, 1)], length) if step % 2 else None
            bias = tokens(2, 4, length, 1, seed=step)
            expected = clean(x.clone(), attention_mask=mask, attn_bias=bias, return_weights=step % 3 == 0)
            out = module(x, attention_mask=mask, attn_bias=bias, return_weights=step % 3 == 0)
            out, weights = out if isinstance(out, tuple) else (out, None)
            assert torch.equal(out, expected[0] if isinstance(expected, tuple) else expected)
            scribble(x, mask, bias, out, weights)
            assert cache_snapshot(module) == cache_snapshot(clean)


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_cross_attention(mode: str) -> None:
    """Changed inputs are another source, which is detected; changed outputs have no effect."""
    module, plain = build(Options(causal=False)), build(Options(causal=False), use_kv_cache=False)
    with MODES[mode]():
        kv, kv_mask = tokens(2, 4, 16), padding([(0, 4), (0, 3)], 4)
        for step in range(4):
            x = tokens(2, 2, 16, seed=step)
            out, weights = module(x, kv, kv_mask=kv_mask, return_weights=True)
            assert_same((out, weights), plain(x, kv, kv_mask=kv_mask, return_weights=True), atol=1e-12)
            scribble(out, weights, x)
            before = cache_snapshot(module)
            if step == 1:
                kv += 1.0
            if step == 2:
                kv_mask[1] = True
            assert cache_snapshot(module) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_last_stays_what_it_was(kind: str) -> None:
    """`kv_cache['key']` is a view: the next token is written behind it, and only unused slots change."""
    module = build(Options(**KINDS[kind]))
    with torch.no_grad():
        module(tokens(2, 3, 16))
        views = [*module.kv_cache.values()]
        kept = [view.clone() for view in views]
        poison_dead_slots(module)
        module(tokens(2, 1, 16))
    assert all(torch.equal(view, copy) for view, copy in zip(views, kept, strict=True))


def test_the_same_input_twice() -> None:
    """A buffer that the caller fills anew for every token, as a loop that allocates nothing would."""
    module, clean = build(Options(window_size=4)), build(Options(window_size=4))
    buffer = torch.empty(1, 1, 16, dtype=torch.float64)
    with torch.no_grad():
        for step in range(12):
            x = tokens(1, 1, 16, seed=step)
            buffer.copy_(x)
            assert torch.equal(module(buffer), clean(x))
