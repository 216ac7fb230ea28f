"""Random conversations of the attention modules, compared with the plain-loop oracle."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracle import Conversation, Options, cross
from tests.setups import SCHEMES, build, padding, tokens, without_cache
from transformer.kernels import tuned

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
GRAD_MODES = ("grad", "no_grad", "inference")


def grad_mode(name: str) -> AbstractContextManager[None]:
    return {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }[name]()


@dataclass(frozen=True)
class Call:
    """One call of a conversation, as plain data."""

    length: int
    spans: tuple[tuple[int, int], ...] | None = None  # (start, count) of each row's real tokens
    mode: bool | None = None
    grad: str = "no_grad"
    bias: str | None = None
    weights: bool = True
    forget: str = "nothing"  # before the call: "nothing", or everything by "clear" or by "None"


def bias_of(kind: str | None, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor | None:
    if kind is None:
        return None
    drawn = tokens(*shape, seed=seed, dtype=dtype)
    if kind == "bool":
        return drawn > -0.5
    if kind == "keys":
        return drawn[:1, :1, :1]
    if kind == "hidden":
        return drawn.masked_fill(drawn > 0.5, -torch.inf)
    return drawn


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    error = (actual.double() - expected).abs().max().item() if actual.numel() else 0.0
    assert error <= TOLERANCE[actual.dtype], (what, error)


def run_conversation(module: nn.Module, options: Options, batch: int, calls: list[Call], seed: int = 0) -> None:
    """Run the calls through the module and the oracle, comparing everything after each."""
    oracle = Conversation(module, options)
    dtype = module.q_proj.weight.dtype
    for number, call in enumerate(calls):
        if call.forget == "clear" and module.kv_cache is not None:
            module.kv_cache.clear()
        if call.forget == "None":
            module.kv_cache = None
        if call.forget != "nothing":
            oracle = Conversation(module, options)
        x = tokens(batch, call.length, options.embed_dim, seed=seed + number, dtype=dtype)
        mask = None if call.spans is None else padding(list(call.spans), call.length)
        held = max(oracle.cached_lengths, default=0) if options.cached else 0
        shape = (batch, options.num_heads, call.length, held + call.length)
        bias = bias_of(call.bias, shape, seed + 1000 + number, dtype)
        expected, shares = oracle.call(x, mask, call.mode, bias)
        with grad_mode(call.grad):
            answer = module(x, None, call.mode, attention_mask=mask, attn_bias=bias, return_weights=call.weights)
        out = answer[0] if call.weights else answer
        close(out, expected, f"outputs of call {number}")
        if mask is not None:
            assert not out[~mask].any(), "a padded token's own output is exactly 0"
        if call.weights:
            close(answer[1], shares, f"weights of call {number}")
        if options.cached and max(oracle.lengths) > 0:
            cache = module.kv_cache
            assert cache.cached_lengths.tolist() == oracle.cached_lengths, number
            assert cache.lengths.tolist() == oracle.lengths, number
            assert (cache.cached_length, cache.length) == (max(oracle.cached_lengths), max(oracle.lengths))
            assert cache["key"].shape[2] == max(oracle.cached_lengths)
            close(cache["value"], oracle.held_values(), f"values held after call {number}")


@st.composite
def module_options(draw: st.DrawFn) -> tuple[str, Options]:
    kind = draw(st.sampled_from(("MHA", "MQA", "GQA")))
    heads = draw(st.sampled_from((1, 2, 3, 4, 6)))
    groups = {"MHA": heads, "MQA": 1}.get(kind) or draw(st.sampled_from([g for g in (1, 2, 3, 6) if heads % g == 0]))
    window = draw(st.sampled_from((None, None, 1, 2, 3, 5)))
    return kind, Options(
        embed_dim=12,  # not a multiple of head_dim 8, and E/H for none but 2 and 3 heads
        num_heads=heads,
        num_groups=groups,
        head_dim=draw(st.sampled_from((4, 6, 8))),
        causal=draw(st.sampled_from((True, True, False))),
        cached=draw(st.sampled_from((True, True, True, False))),
        window_size=window,
        num_sinks=0 if window is None else draw(st.sampled_from((0, 0, 1, 3))),
        scale=draw(st.sampled_from((None, None, 0.7))),
        softcap=draw(st.sampled_from((None, None, 1.5))),
        sink_logits=draw(st.sampled_from((False, False, True))),
        qk_norm=draw(st.booleans()),
        qk_norm_per_head=draw(st.booleans()),
        scheme=SCHEMES[draw(st.sampled_from(sorted(SCHEMES)))],
    )


@st.composite
def conversations(draw: st.DrawFn) -> tuple[int, list[Call]]:
    batch = draw(st.integers(1, 3))
    calls = []
    for _ in range(draw(st.integers(1, 5))):
        length = draw(st.sampled_from((1, 1, 2, 3, 5, 8, 0)))
        spans = None
        if draw(st.booleans()):
            spans = []
            for _ in range(batch):
                count = draw(st.integers(0, length))
                spans.append((draw(st.integers(0, length - count)), count))
        calls.append(
            Call(
                length,
                None if spans is None else tuple(spans),
                draw(st.sampled_from((None, True, False))),
                draw(st.sampled_from(GRAD_MODES)),
                draw(st.sampled_from((None, None, "float", "bool", "keys", "hidden"))),
                draw(st.booleans()),
            )
        )
    return batch, calls


@pytest.mark.slow
@settings(max_examples=300)
@given(
    module_options(),
    conversations(),
    st.sampled_from((torch.float64, torch.float32)),
    st.booleans(),
    st.sampled_from((0, 16)),
    st.integers(0, 2**16),
)
def test_any_conversation(
    built: tuple[str, Options],
    conversation: tuple[int, list[Call]],
    dtype: torch.dtype,
    bias: bool,
    fewest: int,
    seed: int,
) -> None:
    """Any module, any calls, padded rows one by one or together: outputs, weights, tokens held and tokens seen are the
    oracle's."""
    kind, options = built
    batch, calls = conversation
    with tuned(min_row_tokens=fewest):
        run_conversation(build(options, kind, dtype, seed, bias=bias), options, batch, calls, seed)


@pytest.mark.slow
@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from((False, False, True, None)),
            st.integers(1, 4),
            st.tuples(st.integers(0, 4), st.integers(0, 4)),
            st.sampled_from(("nothing", "nothing", "nothing", "nothing", "clear", "None")),
        ),
        min_size=2,
        max_size=7,
    ),
    st.booleans(),
    st.booleans(),
)
def test_a_window_that_the_first_sliding_call_sets(
    calls: list[tuple[bool | None, int, tuple[int, int], str]], causal: bool, cached: bool
) -> None:
    """Fixed at the first sliding call that has a real token, for the rest of the conversation."""
    options = Options(num_heads=1, num_groups=1, causal=causal, cached=cached)
    conversation = [
        Call(length, tuple((0, min(count, length)) for count in counts), mode, forget=forget)
        for mode, length, counts, forget in calls
    ]
    run_conversation(build(options), options, 2, conversation)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False], ids=["expanding", "sliding"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("kind", "groups"), [("MHA", 4), ("GQA", 2), ("MQA", 1)])
def test_prompt_chunk_then_tokens(kind: str, groups: int, scheme: str, mode: bool) -> None:
    """Issues: keras-hub#2862, candle#899, mlx-lm#1805, transformers#33691 #35350, litgpt#2182. While decoding, a bias
    as if the query stood at position 0; rotary after the counter moved, or adrift after eviction; a second chunk over a
    full window."""
    options = Options(num_groups=groups, window_size=3, num_sinks=1, scheme=SCHEMES[scheme])
    calls = [Call(5, mode=mode), Call(4, mode=mode), *[Call(1, mode=mode)] * 4]
    run_conversation(build(options, kind), options, 2, calls)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (3, 0), (4, 2)])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("heads", [12, 16])
def test_alibi_slopes_between_powers_of_two(heads: int, cached: bool, window: int | None, sinks: int) -> None:
    """In float64 they are those of float64: rounded to float32 they would be wrong by 1e-8 for each token."""
    options = Options(
        num_heads=heads,
        num_groups=heads // 2,
        cached=cached,
        window_size=window,
        num_sinks=sinks,
        scheme=SCHEMES["alibi"],
    )
    calls = [Call(40, spans=((0, 40), (3, 30))), Call(3), Call(1), Call(1, weights=False), Call(5, grad="grad")]
    module = build(options)
    run_conversation(module, options, 2, calls if cached else calls[:1])
    module.kv_cache, module.use_kv_cache = None, False
    x = tokens(1, 9, options.embed_dim)
    mapped = torch.func.vmap(lambda x: module(x))(x[None])[0]
    close(mapped, Conversation(module, without_cache(options)).call(x)[0], "a traced call")


@pytest.mark.slow
@settings(max_examples=36)
@given(
    st.sampled_from((1, 3, 16, 40)),
    st.sampled_from((0, 2)),
    st.sampled_from(sorted(SCHEMES)),
    st.sampled_from((True, True, False)),
    st.sampled_from(((150,), (257,), (64, 96), (20, 130, 1))),
    st.sampled_from((None, (0, 5), (3, 9))),
    st.sampled_from(GRAD_MODES),
    st.booleans(),
)
def test_chunks_far_longer_than_the_window(
    window: int,
    sinks: int,
    scheme: str,
    causal: bool,
    lengths: tuple[int, ...],
    margins: tuple[int, int] | None,
    grad: str,
    weights: bool,
) -> None:
    """Issues: litgpt#2182, executorch#21857 #20346 #21749. A chunk longer than the window, where a prefill goes block
    by block, in float32."""
    options = Options(
        num_heads=2,
        num_groups=1,
        causal=causal,
        window_size=window,
        num_sinks=sinks,
        scheme=SCHEMES[scheme],
    )
    calls = []
    for length in lengths:
        left, right = margins or (0, 0)
        spans = None if margins is None else ((min(left, length - 1), max(length - left - right, 1)),)
        calls.append(Call(length, spans, grad=grad, weights=weights))
    run_conversation(build(options, "MQA", torch.float32), options, 1, calls)


@settings(max_examples=40)
@given(
    module_options(),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sampled_from((None, "float", "bool", "keys", "hidden")),
    st.sampled_from(GRAD_MODES),
    st.integers(0, 2**16),
)
def test_cross_attention(
    built: tuple[str, Options],
    rows: list[tuple[int, int, int]],
    length: int,
    bias: str | None,
    grad: str,
    seed: int,
) -> None:
    """Issues: flash-attn `MHA`. The encoder's keys were appended again at each step: three calls over one source."""
    kind, options = built
    options = Options(**{**vars(options), "causal": False})
    module = build(options, kind, seed=seed, kv_dim=5)
    kv = tokens(len(rows), 4, 5, seed=seed)
    kv_mask = padding([(min(start, 4 - min(count, 4)), min(count, 4)) for start, count, _ in rows], 4)
    for step in range(3):
        x = tokens(len(rows), length, options.embed_dim, seed=seed + 1 + step)
        mask = padding([(0, real) for _, _, real in rows], length)
        added = bias_of(bias, (len(rows), options.num_heads, length, 4), seed + step, x.dtype)
        expected, shares = cross(module, options, x, kv, kv_mask, mask, added)
        keywords = {"kv_mask": kv_mask, "attention_mask": mask, "attn_bias": added}
        with grad_mode(grad):
            out, weights = module(x, kv, **keywords, return_weights=True)
            plain = module(x, kv, **keywords)
        close(out, expected, "outputs")
        close(plain, expected, "outputs without weights")
        close(weights, shares, "weights")
