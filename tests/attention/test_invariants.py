"""Invariants: any split equals one shot, a row does not depend on other rows, and the three modules agree."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens, without_cache
from transformer.kernels import tuned
from transformer.kernels.tuning import DEFAULT

SCHEME_NAMES = st.sampled_from(sorted(SCHEMES))
NAN, INF = float("nan"), float("inf")


def pieces(x: Tensor, mask: Tensor | None, cuts: list[int]) -> list[tuple[Tensor, Tensor | None]]:
    edges = [0, *sorted(cuts), x.shape[1]]
    return [(x[:, a:b], None if mask is None else mask[:, a:b]) for a, b in pairwise(edges)]


def conversation(module: nn.Module, x: Tensor, mask: Tensor | None, cuts: list[int], mode: bool | None) -> Tensor:
    parts = pieces(x, mask, cuts)
    outputs = [module(part, None, mode, attention_mask=real) for part, real in parts]
    return torch.cat(outputs, dim=1)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    st.data(),
    SCHEME_NAMES,
    st.sampled_from((1, 2, 4)),
    st.sampled_from((1, 2, 3, 7)),
    st.sampled_from((0, 0, 2)),
    st.booleans(),
    st.booleans(),
)
def test_any_split_is_one_shot(
    data: st.DataObject, scheme: str, groups: int, window: int, sinks: int, mode: bool, padded: bool
) -> None:
    """Issues: litgpt#2182, executorch#21857 #20346 #21749, flash-linear-attention `Cache`, hnet#20, nanochat#452,
    keras-hub#1738 #2186, flash-attn `MHA` with a window, torchtune `MultiHeadAttention`. A chunk longer than the
    window, or a second one over a full window; decoding ignored the window that prefill had applied; with a cache,
    attention was silently not causal."""
    options = Options(num_groups=groups, window_size=window, num_sinks=sinks, scheme=SCHEMES[scheme], qk_norm=True)
    length = data.draw(st.integers(1, 24))
    cuts = data.draw(st.lists(st.integers(0, length), max_size=6))
    x, mask = tokens(3, length, 16), None
    if padded:
        start = st.integers(0, length)
        starts = [data.draw(start) for _ in range(3)]
        mask = padding([(s, data.draw(st.integers(0, length - s))) for s in starts], length)
    with torch.no_grad():
        whole = build(without_cache(options))(x, None, mode, attention_mask=mask)
        split = conversation(build(options), x, mask, cuts, mode)
    torch.testing.assert_close(split, whole, atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("window", [None, 1023, 1030, 1200])
@pytest.mark.parametrize("new_lengths", [(70, 70), (70, 9)], ids=["alike", "one row shorter"])
def test_a_chunk_over_many_cached_tokens_equals_one_call(
    new_lengths: tuple[int, int], window: int | None, groups: int
) -> None:
    """A chunk attends to the cached tokens without a mask where it sees all of them, and with one where it does not."""
    options = Options(num_groups=groups, window_size=window, scheme=SCHEMES["rotary halves"])
    x = tokens(2, DEFAULT.min_prefix + 160, 16)
    mask = torch.ones(2, DEFAULT.min_prefix + 160, dtype=torch.bool)
    cuts = [DEFAULT.min_prefix, DEFAULT.min_prefix + 70]
    mask[0, DEFAULT.min_prefix + new_lengths[0] : cuts[1]] = False
    mask[1, DEFAULT.min_prefix + new_lengths[1] : cuts[1]] = False
    with torch.no_grad():
        whole = build(without_cache(options))(x, attention_mask=mask)
        split = conversation(build(options), x, mask, cuts, None)
    torch.testing.assert_close(split, whole, atol=1e-10, rtol=0)


@pytest.mark.slow
@settings(max_examples=80)
@given(
    st.data(),
    SCHEME_NAMES,
    st.sampled_from((None, 1, 3)),
    st.sampled_from((0, 2)),
    st.booleans(),
)
def test_a_row_is_alone(data: st.DataObject, scheme: str, window: int | None, sinks: int, causal: bool) -> None:
    """Issues: mlx-lm#439 #735, unsloth#3699, transformers#22161, x-transformers#292. Padding filled the window or moved
    positions: a row of a padded batch equals the same row alone, without any padding."""
    options = Options(causal=causal, scheme=SCHEMES[scheme], num_groups=2, window_size=window)
    options = replace(options, num_sinks=0 if window is None else sinks)
    # Sliding without a given window is the one rule that looks at the longest row.
    modes = st.sampled_from((None, True) if window is None else (None, True, False))
    batch, alone = build(options), [build(options) for _ in range(3)]
    for step in range(data.draw(st.integers(1, 5))):
        length, mode = data.draw(st.sampled_from((1, 2, 4, 6))), data.draw(modes)
        counts = [data.draw(st.integers(0, length)) for _ in range(3)]
        spans = [(data.draw(st.integers(0, length - count)), count) for count in counts]
        x = tokens(3, length, 16, seed=step)
        with torch.set_grad_enabled(data.draw(st.booleans())):
            with tuned(min_row_tokens=data.draw(st.sampled_from((0, 16)))):
                out = batch(x, None, mode, attention_mask=padding(spans, length))
            for row, (start, count) in enumerate(spans):
                own = slice(start, start + count)
                expected = alone[row](x[row : row + 1, own], None, mode)
                torch.testing.assert_close(out[row : row + 1, own], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("scheme", ["none", "rotary halves", "alibi", "t5 causal"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("grad", [False, True])
def test_what_padding_contains_has_no_influence(poison: float, scheme: str, window: int | None, grad: bool) -> None:
    """Issues: flash-attention#1745, vllm#641. NaN or Inf in an unused or masked slot reached the output."""
    options = Options(scheme=SCHEMES[scheme], window_size=window, num_groups=2, qk_norm=True)
    clean, dirty = build(options), build(options)
    spans = [[(0, 4), (2, 2), (1, 2)], [(0, 0), (0, 3), (3, 1)], [(1, 3), (0, 4), (0, 0)]]
    with torch.set_grad_enabled(grad):
        for step, row_spans in enumerate(spans):
            x, mask = tokens(3, 4, 16, seed=step), padding(row_spans, 4)
            spoiled = x.masked_fill(~mask[..., None], poison)
            out, weights = clean(x, attention_mask=mask, return_weights=True)
            same, shares = dirty(spoiled, attention_mask=mask, return_weights=True)
            assert torch.equal(out, same)
            assert torch.equal(weights, shares)
        x = tokens(3, 1, 16, seed=9)
        assert torch.equal(clean(x), dirty(x))
    for name in ("key", "value"):
        assert torch.equal(clean.kv_cache[name], dirty.kv_cache[name])


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_spoiled_row_spoils_no_other(poison: float, window: int | None, cached: bool, padded: bool) -> None:
    """FAULTS, NaN in one row: the other rows are bit-identical."""
    options = Options(window_size=window, cached=cached, scheme=SCHEMES["rotary halves"])
    clean, dirty = build(options), build(options)
    mask = padding([(0, 4), (1, 3), (0, 3)], 4) if padded else None
    for step in range(3):
        x = tokens(3, 4, 16, seed=step)
        spoiled = x.clone()
        if step == 0:
            spoiled[1, 2] = poison
        with torch.no_grad():
            out = clean(x, attention_mask=mask)
            other = dirty(spoiled, attention_mask=mask)
        assert torch.equal(out[[0, 2]], other[[0, 2]])


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_masked_source_tokens_have_no_influence(poison: float, cached: bool, grad: bool) -> None:
    module = build(Options(causal=False, cached=cached, num_groups=2))
    other = build(Options(causal=False, cached=cached, num_groups=2))
    kv, kv_mask = tokens(2, 5, 16, seed=1), padding([(0, 3), (2, 3)], 5)
    spoiled = kv.masked_fill(~kv_mask[..., None], poison)
    with torch.set_grad_enabled(grad):
        for step in range(2):
            x = tokens(2, 3, 16, seed=2 + step)
            out = module(x, kv, kv_mask=kv_mask)
            assert torch.equal(out, other(x, spoiled, kv_mask=kv_mask))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("window", [None, 3])
def test_the_three_modules_are_one(scheme: str, window: int | None) -> None:
    """MHA is GQA with G = H, MQA is GQA with G = 1, and GQA is MHA whose key/value heads are repeated."""
    options = Options(scheme=SCHEMES[scheme], window_size=window, num_groups=2)
    full, one = replace(options, num_groups=4), replace(options, num_groups=1)
    pairs = [(build(full, "MHA"), build(full)), (build(one, "MQA"), build(one))]
    grouped, repeated = build(options), build(full, "MHA")
    weights = dict(grouped.state_dict())
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        heads = weights[name].unflatten(0, (2, 4))
        weights[name] = heads.repeat_interleave(2, 0).flatten(0, 1)
    repeated.load_state_dict(weights)
    pairs.append((grouped, repeated))
    for a, b in pairs:
        for step, length in enumerate((5, 1, 4)):
            x = tokens(2, length, 16, seed=step)
            torch.testing.assert_close(a(x), b(x), atol=1e-12, rtol=0)
