"""Packed documents, prefixes and positions of the caller: against the oracle, apart, traced, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.attention.test_rules import dilated, dilated_by_loops, near, near_by_loops
from tests.conversations import assert_same, cache_snapshot
from tests.oracle import Conversation, Options
from tests.setups import SCHEMES, build, padding, tokens
from transformer.attention import TokenLayout, plan_steps
from transformer.errors import ArgumentError, CacheStateError, DtypeError, ShapeError

SEGMENTS = torch.tensor([[3, 3, 3, 3, 1, 1, 0, 2, 2, 2, 2, 2], [0, 0, 5, 5, 5, 5, 5, 5, 5, 7, 0, 7]])
DOCUMENTS = [(0, 0, 4), (0, 4, 6), (0, 7, 12), (1, 2, 9), (1, 9, 10), (1, 11, 12)]
"""Row, first and last column of each."""
SPANS = [(0, 7), (2, 5)]
"""Real tokens of two rows of 8."""

MODES = ((None, 0), (2, 0), (2, 2), (3, 1))
"""Window and sinks."""
BY_NAME = ("none", "rotary partial", "alibi", "t5 causal")
PLAIN = Options(num_groups=2, cached=False)


def options(scheme: str, window: int | None, sinks: int, *, causal: bool = True, cached: bool = False) -> Options:
    named = {"window_size": window, "num_sinks": sinks, "scheme": SCHEMES[scheme]}
    return replace(PLAIN, causal=causal, cached=cached, **named)


def apart(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and weights of each document alone, at their places."""
    out, weights = torch.zeros_like(x), x.new_zeros(2, 4, 12, 12)
    for row, begin, end in DOCUMENTS:
        own, shares = module(x[row : row + 1, begin:end], return_weights=True)
        out[row, begin:end], weights[row, :, begin:end, begin:end] = own[0], shares[0]
    return out, weights


@pytest.mark.parametrize("scheme", BY_NAME)
def test_packed_documents_are_the_documents_apart(scheme: str) -> None:
    """Outputs, weights and gradients, to the last places: nothing of a neighbour, of padding or of a place in a row."""
    for (window, sinks), causal in product(MODES, (True, False)):
        module = build(options(scheme, window, sinks, causal=causal))
        packed, alone = (tokens(2, 12, 16).requires_grad_() for _ in range(2))
        with torch.no_grad():
            packed[1, 10] = packed[0, 6] = torch.nan
        step = module.plan(packed, layout=TokenLayout(SEGMENTS.int()))
        out, weights = module(packed, step=step, return_weights=True)
        expected = apart(module, alone)
        assert_same((out, weights), expected)
        with torch.inference_mode():
            assert_same(module(packed, step=module.plan(packed, layout=TokenLayout(SEGMENTS))), expected[0])
        for each in (out, expected[0]):
            (each * tokens(2, 12, 16, seed=1)).sum().backward()
        assert_same(packed.grad, alone.grad)


def test_packed_documents_in_16_bits() -> None:
    for dtype, atol in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)):
        module, x = build(options("rotary partial", None, 0), dtype=dtype), tokens(2, 12, 16, dtype=dtype)
        exact = build(options("rotary partial", None, 0))
        with torch.no_grad():
            out = module(x, step=module.plan(x, layout=TokenLayout(SEGMENTS)))
            exact.load_state_dict(module.state_dict())
            assert_same(out.double(), apart(exact, x.double())[0], atol)


@pytest.mark.parametrize("scheme", BY_NAME)
def test_a_prefix_against_the_oracle(scheme: str) -> None:
    """Each mode, padded and not, in one call, and in a cached one after which causal ones go on."""
    for (window, sinks), prefixes, padded in product(MODES, ([4, 0], [5, 3]), (False, True)):
        own = options(scheme, window, sinks)
        module, cached = build(own), build(replace(own, cached=True))
        x, mask = tokens(2, 8, 16), padding(SPANS, 8) if padded else None
        layout = TokenLayout(prefix_lengths=torch.tensor(prefixes))
        expected = Conversation(module, own).call(x, mask, prefixes=prefixes)
        step = module.plan(x, None, mask, layout)
        assert_same(module(x, step=step, return_weights=True), expected)
        with torch.inference_mode():
            assert_same(module(x, step=module.plan(x, None, mask, layout)), expected[0])
            first = cached(x, step=cached.plan(x, None, mask, layout))
            oracle = Conversation(cached, replace(own, cached=True))
            assert_same(first, oracle.call(x, mask, prefixes=prefixes)[0])
            assert_same(cached(x[:, :2]), oracle.call(x[:, :2])[0])


@pytest.mark.parametrize("stored", [("int8", "int8"), (None, "int4")])
def test_a_prefix_that_is_cached_as_records(stored: tuple[str | None, str]) -> None:
    """Queries read what the records stand for, in the call that makes them too."""
    for window, sinks in MODES:
        own = replace(options("rotary partial", window, sinks, cached=True), stored=stored)
        module, x, prefixes = build(own), tokens(2, 8, 16), [5, 0]
        oracle, layout = Conversation(module, own), TokenLayout(prefix_lengths=torch.tensor(prefixes))
        with torch.no_grad():
            assert_same(module(x, step=module.plan(x, layout=layout)), oracle.call(x, prefixes=prefixes)[0])
            assert_same(module(x[:, :2]), oracle.call(x[:, :2])[0])


def test_rules_and_modules_with_hooks_see_each_document_alone() -> None:
    """A module with a hook inside is given documents as rows."""

    def near(q_position: Tensor, k_position: Tensor) -> Tensor:
        return (q_position - k_position) % 2 == 0

    module, x = build(options("t5 causal", None, 0), mask_rule=near), tokens(2, 12, 16)
    layouts, expected = (TokenLayout(SEGMENTS), TokenLayout(prefix_lengths=torch.tensor([5, 0]))), apart(module, x)
    outputs = [module(x, step=module.plan(x, layout=layout)) for layout in layouts]
    assert_same(outputs[0], expected[0])
    loops = replace(options("t5 causal", None, 0), shows=lambda _head, q, k: (q - k) % 2 == 0)
    assert_same(outputs[1], Conversation(module, loops).call(x, prefixes=[5, 0])[0])
    seen: list[Tensor] = []
    for part in (module.q_proj, module.out_proj):
        part.register_forward_hook(lambda _module, given, _out: seen.append(given[0]))
    assert_same([module(x, step=module.plan(x, layout=layout)) for layout in layouts], outputs)
    assert [tuple(each.shape[:2]) for each in seen] == [(6, 7), (6, 7), (2, 12), (2, 12)]


@pytest.mark.parametrize("scheme", BY_NAME)
def test_positions_of_the_caller_against_the_oracle(scheme: str) -> None:
    """They move rotations and distances alone: who sees whom stays. Keys are cached rotated, so rotary ones go on."""
    placed = torch.tensor([[0, 3, 4, 9, 9, 2, 50, 51], [7, 6, 5, 4, 3, 2, 1, 0]])
    for window, padded in product((None, 3), (False, True)):
        own = options(scheme, window, 0, cached=scheme.startswith("rotary"))
        module, x, mask = build(own), tokens(2, 8, 16), padding(SPANS, 8) if padded else None
        oracle = Conversation(module, own)
        for _ in range(2):
            expected = oracle.call(x, mask, placed=placed.tolist())
            with torch.no_grad():
                assert_same(module(x, attention_mask=mask, positions=placed, return_weights=True), expected)
    without = build(replace(own, cached=False))
    step = without.plan(x, None, mask, TokenLayout(prefix_lengths=torch.tensor([3, 2]), position_ids=placed))
    expected = Conversation(without, replace(own, cached=False)).call(x, mask, prefixes=[3, 2], placed=placed.tolist())
    assert_same(without(x, step=step, return_weights=True), expected)


@pytest.mark.parametrize("scheme", ["rotary partial", "t5 causal"])
def test_traced_calls_say_the_same(scheme: str) -> None:
    module, x, mask = build(options(scheme, 3, 0)), tokens(2, 12, 16), padding([(0, 9), (1, 11)], 12)
    placed = torch.arange(24).flip(0).view(2, 12)

    def whole(x: Tensor, real: Tensor | None, layout: TokenLayout) -> Tensor:
        return module(x, step=module.plan(x, None, real, layout))

    for real, layout in (
        (None, TokenLayout(SEGMENTS)),
        (mask, TokenLayout(prefix_lengths=torch.tensor([5, 2]))),
        (mask, TokenLayout(position_ids=placed)),
    ):
        given = (layout.segment_ids != 0 if real is None else real).unsqueeze(-1)
        call = partial(whole, real=real, layout=layout)
        assert_same(make_fx(call)(x)(x) * given, call(x) * given)


def test_a_compiled_block_is_given_a_step_that_was_planned_outside() -> None:
    module, x = build(options("alibi", 3, 0)), tokens(2, 12, 16)
    step = plan_steps([module], x, layout=TokenLayout(SEGMENTS))[0]
    compiled = torch.compile(lambda x: module(x, step=step), backend="eager", fullgraph=True)
    assert_same(compiled(x) * step.real.unsqueeze(-1), module(x, step=step))


def test_what_does_not_fit_is_refused_by_name() -> None:
    module, cached = build(options("none", None, 0)), build(options("none", None, 0, cached=True))
    x, ones = tokens(2, 12, 16), torch.ones(2, dtype=torch.int64)
    mask = torch.ones(2, 12, dtype=torch.bool)
    row = torch.arange(12).expand(2, 12)

    def refused(error: type[Exception], match: str, layout: TokenLayout, module=module, mask: Tensor | None = None):
        with pytest.raises(error, match=match):
            module(x, step=module.plan(x, None, mask, layout))

    refused(ShapeError, "segment_ids", TokenLayout(SEGMENTS[:, :3]))
    refused(DtypeError, "segment_ids", TokenLayout(SEGMENTS.bool()))
    refused(ArgumentError, "attention_mask.*segment_ids", TokenLayout(SEGMENTS), mask=mask)
    refused(ArgumentError, "segment_ids.*caches", TokenLayout(SEGMENTS), cached)
    refused(ArgumentError, "prefix_lengths.*segment_ids", TokenLayout(SEGMENTS, ones))
    refused(ShapeError, "prefix_lengths", TokenLayout(prefix_lengths=torch.ones(3, dtype=torch.int64)))
    refused(ArgumentError, "row 1.*got 13", TokenLayout(prefix_lengths=torch.tensor([1, 13])))
    refused(ArgumentError, "causal", TokenLayout(prefix_lengths=ones), build(options("none", None, 0, causal=False)))
    refused(ArgumentError, "positions.*got -1", TokenLayout(position_ids=row - 1))
    refused(ArgumentError, "positions.*sinks", TokenLayout(position_ids=row), build(options("none", 2, 1)))
    refused(ArgumentError, "ALiBi", TokenLayout(position_ids=row), build(options("alibi", None, 0, cached=True)))
    assert cached.kv_cache is None
    cached(x)
    before = cache_snapshot(cached)
    refused(CacheStateError, "prefix_lengths.*begin", TokenLayout(prefix_lengths=ones), cached)
    assert cache_snapshot(cached) == before
    with pytest.raises(ArgumentError, match="attn_bias"):
        module(x, step=module.plan(x, layout=TokenLayout(SEGMENTS)), attn_bias=torch.zeros(12, 12))
    with pytest.raises(ArgumentError, match=r"positions.*step"):
        module(x, step=module.plan(x), positions=row)
    with pytest.raises(ArgumentError, match=r"positions.*kv"):
        module(x, x, positions=row)
    cached.kv_cache, step = None, module.plan(x, layout=TokenLayout(SEGMENTS))
    with pytest.raises(ArgumentError, match=r"segment_ids.*caches"):
        cached(x, step=step)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (3, 1)])
def test_rules_are_told_positions_in_documents_and_never_those_of_callers(window: int | None, sinks: int) -> None:
    own = options("rotary partial", window, sinks)
    module = build(own, mask_rule=dilated, score_rule=near)
    ruled, x = replace(own, shows=dilated_by_loops, changed=near_by_loops), tokens(2, 12, 16)
    out, weights = module(x, step=module.plan(x, layout=TokenLayout(SEGMENTS)), return_weights=True)
    for row, begin, end in DOCUMENTS:
        wanted = Conversation(module, ruled).call(x[row : row + 1, begin:end])
        assert_same((out[row : row + 1, begin:end], weights[row : row + 1, :, begin:end, begin:end]), wanted)
    layout = TokenLayout(prefix_lengths=torch.tensor([9, 3]))
    wanted = Conversation(module, ruled).call(x, prefixes=[9, 3])
    assert_same(module(x, step=module.plan(x, layout=layout), return_weights=True), wanted)
    if not sinks:
        placed = 3 * torch.arange(24).flip(0).view(2, 12)
        wanted = Conversation(module, ruled).call(x, placed=placed.tolist())
        assert_same(module(x, positions=placed, return_weights=True), wanted)
        call = partial(module, positions=placed, return_weights=True)
        assert_same(make_fx(call)(x)(x), wanted)
