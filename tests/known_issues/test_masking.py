"""Causal order and masks: visible keys, and queries without a visible key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import NAN, assert_same, cache_snapshot, run_chunks
from tests.internals import poison_dead_slots
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens

INF = float("inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize("held", [0, 1, 6])
def test_queries_stand_at_the_newest_keys(held: int, new: int, groups: int) -> None:
    """Issues: pytorch#108108 #144858, Megatron-Bridge#5259. `is_causal` with fewer queries than keys was aligned
    upper-left, so that the new token saw key 0 alone. Told by the weights, and by the outputs without them."""
    options = Options(num_groups=groups)
    x = tokens(1, held + new, 16)
    shown, outputs = [], []
    with torch.no_grad():
        for weights in (True, False):
            module = build(options)
            module(x[:, :held])
            answer = module(x[:, held:], return_weights=weights)
            outputs.append(answer[0] if weights else answer)
            if weights:
                shown = (answer[1][0, 0] > 0).long().tolist()
    assert shown == [[1] * (held + i + 1) + [0] * (new - i - 1) for i in range(new)]
    assert_same(outputs[1], outputs[0])


@pytest.mark.parametrize("window", [None, 3])
def test_a_cached_module_is_causal_without_being_told(window: int | None) -> None:
    """Issues: torchtune `MultiHeadAttention`. With a cache and no mask given, attention was silently not causal. A
    later token of the same chunk changes nothing before it, in the first chunk and in the second."""
    x = tokens(1, 8, 16)
    other = x.clone()
    other[:, [3, 7]] += 1.0
    with torch.no_grad():
        a, b = (run_chunks(build(Options(window_size=window)), sequence, (4, 4)) for sequence in (x, other))
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.equal(a[:, 3], b[:, 3])
    again = other.clone()
    again[:, 3] = x[:, 3]
    with torch.no_grad():
        c = run_chunks(build(Options(window_size=window)), again, (4, 4))
    assert torch.equal(a[:, :7], c[:, :7])
    assert not torch.equal(a[:, 7], c[:, 7])


def hide_row(module: nn.Module, x: Tensor, way: str) -> tuple[Tensor, Tensor]:
    """Output and weights of a call in which query 1 of row 1 sees nothing, with the first row left alone."""
    seen = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    seen[1, :, 1] = False
    if way == "bool":
        return module(x, attn_bias=seen, return_weights=True)
    if way == "float":
        return module(x, attn_bias=torch.zeros(seen.shape).masked_fill(~seen, -INF), return_weights=True)
    if way == "no weights":
        return module(x, attn_bias=seen), torch.zeros(())
    return module(x, attn_bias=seen.to(x.dtype).log(), return_weights=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"window_size": 2, "num_sinks": 1}], ids=str)
def test_a_fully_masked_query_gets_zero(dtype: torch.dtype, cached: bool, more: dict) -> None:
    """Issues: pytorch#103749 #103963 #41508. A fully masked row was NaN, and the NaN travelled. The output is what the
    output projection makes of exactly 0, the weights are 0, every gradient is finite, also in 16 bits."""
    module = build(Options(num_groups=2, scheme=SCHEMES["alibi"], cached=cached, **more), dtype=dtype)
    for way in ("bool", "float", "own dtype", "no weights"):
        module.kv_cache = None
        x = tokens(2, 4, 16, dtype=dtype).requires_grad_()
        out, weights = hide_row(module, x, way)
        assert torch.equal(out[1, 1], module.out_proj.bias), way
        if weights.ndim:
            assert not weights[1, :, 1].any()
        assert out.isfinite().all()
        (out.float().square().sum() + weights.float().square().sum()).backward()
        for name, tensor in (("x", x), *module.named_parameters()):
            assert tensor.grad.isfinite().all(), (way, name)
        module.zero_grad()
        following = tokens(2, 1, 16, dtype=dtype, seed=1)
        assert module(following).isfinite().all(), "what was hidden once is no poison later"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [3, 0])
def test_a_source_that_is_all_padding_gives_zero(source: int, dtype: torch.dtype) -> None:
    """Issues: pytorch#103749 #41508. The same for cross-attention, also over a source of no tokens at all."""
    module = build(Options(causal=False), dtype=dtype)
    kv = tokens(2, source, 16, seed=3, dtype=dtype).requires_grad_()
    hidden = torch.zeros(2, source, dtype=torch.bool)
    for mask in (hidden,) if source else (hidden, None):
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                x = tokens(2, 2, 16, dtype=dtype).requires_grad_()
                out = module(x, kv, kv_mask=mask)
            assert torch.equal(out, module.out_proj.bias.expand_as(out))
            if recorded:
                out.float().square().sum().backward()
                assert x.grad.isfinite().all()
                assert kv.grad is None or kv.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lowest_number_of_another_dtype_is_no_nan(dtype: torch.dtype) -> None:
    """Issues: pytorch#103749. Masks made of `finfo(float32).min` become -inf in 16 bits; a row of them alone stays
    finite."""
    module = build(Options(), dtype=dtype)
    lowest = torch.full((4, 4), torch.finfo(torch.float32).min)
    for weights in (False, True):
        module.kv_cache = None
        x = tokens(1, 4, 16, dtype=dtype).requires_grad_()
        answer = module(x, attn_bias=lowest, return_weights=weights)
        out = answer[0] if weights else answer
        out.float().sum().backward()
        assert out.isfinite().all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("scheme", ["none", "alibi"])
@pytest.mark.parametrize(
    "options",
    [{}, {"window_size": 3}, {"window_size": 3, "num_sinks": 2}, {"window_size": 1, "num_sinks": 6}],
    ids=str,
)
def test_what_lies_in_slots_without_a_token_is_never_read(options: dict, scheme: str, poison: float) -> None:
    """Issues: flash-attention#1745, vllm#641. NaN in an unused slot reached the output as 0 x NaN. Before every call
    each slot that holds no token is poisoned by hand, those of evicted tokens included; growth, a full window
    and a change of mode come along."""
    clean, dirty = (build(Options(num_groups=2, scheme=SCHEMES[scheme], **options)) for _ in range(2))
    poisoned = 0
    with torch.no_grad():
        for step, length in enumerate((2, 1, 1, 2, 1, 70, 1, 1, 4, 1, 130, 1, 1)):
            mode = True if step in (4, 5, 10) else None
            x = tokens(1, length, 16, seed=step)
            assert torch.equal(dirty(x, None, mode), clean(x, None, mode)), step
            poisoned += poison_dead_slots(dirty, poison)
            assert cache_snapshot(dirty) == cache_snapshot(clean)
        x = tokens(1, 3, 16, seed=99)
    assert poisoned > 100
    assert torch.equal(dirty(x), clean(x)), "a call that records gradients reads none of them either"


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_masked_and_padded_tokens_may_hold_anything(poison: float) -> None:
    """Issues: flash-attention#1745, vllm#641. The same for tokens that a mask hides: in `x`, in a source, on either
    side."""
    mask = padding([(2, 2), (0, 3), (1, 2)], 4)
    x, kv = tokens(3, 4, 16), tokens(3, 4, 16, seed=1)
    spoiled_x, spoiled_kv = (tensor.masked_fill(~mask[..., None], poison) for tensor in (x, kv))
    for cached in (False, True):
        a, b = (build(Options(cached=cached, window_size=3)) for _ in range(2))
        cross, other = (build(Options(cached=cached, causal=False)) for _ in range(2))
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(a(x, attention_mask=mask), b(spoiled_x, attention_mask=mask))
                assert torch.equal(cross(x, kv, kv_mask=mask), other(x, spoiled_kv, kv_mask=mask))
                both = other(spoiled_x, spoiled_kv, kv_mask=mask, attention_mask=mask)
                assert torch.equal(cross(x, kv, kv_mask=mask, attention_mask=mask), both)
        assert cache_snapshot(a) == cache_snapshot(b)
