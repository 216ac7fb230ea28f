"""Windows that other libraries count wrongly, in the mask or in the cache."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.conversations import assert_same, run_chunks
from tests.oracle import Conversation, Options
from tests.setups import SCHEMES, build, tokens, without_cache

WINDOWS = (1, 2, 3, 5)
CHUNKINGS = {"one by one": (1,) * 12, "one chunk": (12,), "prompt then tokens": (7, 1, 1, 1, 1, 1)}


@pytest.mark.parametrize("lengths", CHUNKINGS.values(), ids=CHUNKINGS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_token_reaches_exactly_w_queries(window: int, lengths: tuple[int, ...]) -> None:
    """Issues: transformers#39408, mlx-lm#390, x-transformers `max_attend_past`. A window of W let W + 1 keys through.
    Told by what depends on what: another token at position 4 changes the outputs at 4 to 4 + W - 1 and no other."""
    x = tokens(1, 12, 16)
    other = x.clone()
    other[:, 4] += 1.0
    changed = []
    for cached in (True, False):
        options = Options(window_size=window, cached=cached)
        calls = lengths if cached else (12,)
        with torch.no_grad():
            a, b = (run_chunks(build(options), sequence, calls) for sequence in (x, other))
        changed.append((a != b).any(-1)[0].nonzero().flatten().tolist())
    assert changed == [list(range(4, 4 + window))] * 2


@pytest.mark.parametrize("window", WINDOWS)
def test_the_cache_holds_as_many_as_the_mask_shows(window: int) -> None:
    """Issues: transformers#39408, mlx-lm#390. Mask and cache counted a window differently."""
    module = build(Options(window_size=window))
    with torch.no_grad():
        for step in range(1, 3 * window + 3):
            _, weights = module(tokens(1, 1, 16, seed=step), return_weights=True)
            assert int((weights[0, 0, 0] > 0).sum()) == min(step, window)
            assert module.kv_cache.cached_length == module.kv_cache["key"].shape[2] == min(step, window)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("at", [-1, 0, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_no_slot_is_lost_where_the_window_just_fills(window: int, at: int, grad: bool) -> None:
    """Issues: transformers#37574 (a slot lost exactly when the length reached W), transformers 5.23 `sliding_window=1`
    (`-W + 1:` kept everything at W = 1). A prompt of W - 1, W or W + 1 tokens, then one token at a time."""
    options = Options(window_size=window, scheme=SCHEMES["rotary halves"])
    module, oracle = build(options), Conversation(build(options), options)
    prompt, held = window + at, []
    with torch.set_grad_enabled(grad):
        for step, length in enumerate((prompt, 1, 1, 1)):
            x = tokens(1, length, 16, seed=step)
            expected, _ = oracle.call(x)
            assert_same(module(x), expected)
            if module.kv_cache is not None:
                assert_same(module.kv_cache["value"].detach(), oracle.held_values())
                held.append(module.kv_cache.cached_length)
    seen = [count for count in (prompt, prompt + 1, prompt + 2, prompt + 3) if count]
    assert held == [min(count, window) for count in seen]


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_chunks_longer_than_the_window_and_chunks_over_a_full_one(window: int, sinks: int) -> None:
    """Issues: litgpt#2182 (its advised chunking is wrong too), flash-linear-attention `Cache`, executorch#21857 #20346
    #21749. A chunk longer than the window, or a second chunk over a full window, was wrong though single tokens were
    right."""
    options = Options(num_groups=2, window_size=window, num_sinks=sinks, scheme=SCHEMES["rotary halves"])
    x = tokens(2, 11, 16)
    with torch.no_grad():
        whole = build(without_cache(options))(x)
        assert_same(run_chunks(build(options), x, (1,) * 11), whole)
        for lengths in ((2, 9), (9, 2), (1, 9, 1), (5, 6), (4, 4, 3), (3, 3, 3, 2), (3, 1, 5, 2)):
            assert_same(run_chunks(build(options), x, lengths), whole)


@pytest.mark.parametrize("scheme", ["none", "alibi"])
@pytest.mark.parametrize("second", [1, 64, 65, 130])
def test_a_second_chunk_that_is_walked_in_blocks(second: int, scheme: str) -> None:
    """Issues: litgpt#2182, executorch#21857. The same where a chunk is so long that it is worked on in blocks of
    queries, one that fills its last block and ones that do not."""
    options = Options(num_heads=2, num_groups=1, window_size=70, scheme=SCHEMES[scheme])
    x = tokens(1, 100 + second, 16, dtype=torch.float32)
    with torch.no_grad():
        whole = build(without_cache(options), dtype=torch.float32)(x)
        module = build(options, dtype=torch.float32)
        assert_same(run_chunks(module, x, (100, second)), whole, atol=1e-5)
    full = build(without_cache(options), dtype=torch.float32)
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    with torch.no_grad():
        masked = full(x, None, True, attn_bias=(distance >= 0) & (distance < 70))
    assert_same(whole, masked, atol=1e-5)


@pytest.mark.parametrize("scheme", ["none", "rotary halves", "alibi", "t5 causal"])
@pytest.mark.parametrize("mode", [None, False])
def test_decoding_keeps_the_window_of_the_prompt(mode: bool | None, scheme: str) -> None:
    """Issues: hnet#20, nanochat#452, keras-hub#1738 #2186, flash-attn `MHA` with a window. Decoding ignored the window
    that prefill had applied. Every decoded token shows W keys, and what stood before them has no influence."""
    options = Options(window_size=4, scheme=SCHEMES[scheme])
    x = tokens(1, 10, 16)
    other = x.clone()
    other[:, :2] += 1.0
    module, changed = build(options), build(options)
    with torch.no_grad():
        for start, end in pairwise((0, 6, 7, 8, 9, 10)):
            out, weights = module(x[:, start:end], None, mode, return_weights=True)
            same, _ = changed(other[:, start:end], None, mode, return_weights=True)
            assert (weights[0, 0, -1] > 0).sum() == 4
            assert torch.equal(out[:, -1], same[:, -1])


def test_an_expanding_call_has_no_window_and_a_sliding_one_has_it_again() -> None:
    """Issues: nanochat#452, keras-hub#2186. The rule of a call depends on its mode alone, in prefill and while
    decoding."""
    module = build(Options(window_size=3))
    shown = []
    with torch.no_grad():
        for mode, length in ((True, 6), (True, 1), (None, 1), (True, 1), (False, 2)):
            _, weights = module(tokens(1, length, 16, seed=length), None, mode, return_weights=True)
            shown.append((int((weights[0, 0, -1] > 0).sum()), module.kv_cache.cached_length))
    # Tokens that the sliding call evicted cannot be recovered; all others stay.
    assert shown == [(6, 6), (7, 7), (3, 3), (4, 4), (3, 3)]
