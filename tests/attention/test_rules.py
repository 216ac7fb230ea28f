"""Rules of the user's own, of visibility and of scores: against plain loops and flex_attention, in every path."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.attention.splits import assert_splits_change_nothing
from tests.attention.test_against_oracle import Call, conversations, module_options, run_conversation
from tests.conversations import assert_same, cache_snapshot, run_chunks
from tests.oracle import Options
from tests.oracle_operations import EditableConversation
from tests.setups import SCHEMES, build, padding, tokens
from transformer import GroupQueryAttention, KVCache, MultiHeadAttention
from transformer.attention import to_mha, to_torch
from transformer.blocks import BlockStack, DecoderBlock, FeedForward, RMSNorm
from transformer.cache.policies import KeyNorm
from transformer.errors import ArgumentError, ConfigurationError, DtypeError, ShapeError
from transformer.kernels import tuned


def dilated(q_position: Tensor, k_position: Tensor) -> Tensor:
    """Every second token, and each tenth one; a query at 7 sees nothing before itself."""
    distance = q_position - k_position
    return ((distance % 2 == 0) | (k_position % 10 == 0)) & ((q_position != 7) | (k_position > 7))


def dilated_by_loops(_: int, q: int, k: int) -> bool:
    return ((q - k) % 2 == 0 or k % 10 == 0) and (q != 7 or k > 7)


class PerHead(nn.Module):
    """Head `h` sees keys at distances that `h + 1` divides."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("step", torch.arange(1, heads + 1).view(heads, 1, 1))

    def forward(self, q_position: Tensor, k_position: Tensor) -> Tensor:
        return (q_position - k_position) % self.step == 0


class Decay(nn.Module):
    """Scores of each head are capped, and fall with the logarithm of the distance: NaN where the key is later."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(0.5, 1.5, heads).view(heads, 1, 1))

    def forward(self, scores: Tensor, q_position: Tensor, k_position: Tensor) -> Tensor:
        return 2 * torch.tanh(scores / 2) - self.rate * torch.log1p((q_position - k_position).to(scores.dtype))


def decay_by_loops(rates: Tensor) -> Callable[[float, int, int, int], float]:
    numbers = rates.flatten().tolist()
    return lambda score, h, q, k: 2 * math.tanh(score / 2) - numbers[h] * math.log1p(q - k)


def near(scores: Tensor, q_position: Tensor, k_position: Tensor) -> Tensor:
    """Distances of 3 and more are hidden by -inf: with `dilated`, from some queries everything."""
    return scores.masked_fill((q_position - k_position).abs() >= 3, -torch.inf) + k_position.to(scores.dtype) / 100


CALLS = [
    Call(5, ((0, 5), (1, 3)), grad="grad"),
    Call(1, weights=False),
    Call(4, ((0, 2), (0, 4)), bias="hidden", weights=False),
    Call(0),
    Call(3, mode=True, grad="inference", bias="float"),
    Call(9, ((3, 6), (0, 0)), mode=False, weights=False),
    Call(2, mode=False),
]


@pytest.mark.parametrize("scheme", ["none", "rotary halves", "alibi", "t5 causal"])
@pytest.mark.parametrize("options", [{}, {"window_size": 3}, {"window_size": 2, "num_sinks": 3}], ids=str)
@pytest.mark.parametrize("cached", [True, False])
def test_conversations_against_loops(scheme: str, options: dict, cached: bool) -> None:
    plain = Options(num_groups=2, scheme=SCHEMES[scheme], softcap=1.5, cached=cached, **options)
    module = build(plain, mask_rule=dilated, score_rule=Decay(4))
    changes = {"shows": dilated_by_loops, "changed": decay_by_loops(module.score_rule.rate)}
    run_conversation(module, replace(plain, **changes), 2, CALLS)


def per_head_by_loops(h: int, q: int, k: int) -> bool:
    return (q - k) % (h + 1) == 0


def near_by_loops(score: float, _: int, q: int, k: int) -> float:
    return -math.inf if abs(q - k) >= 3 else score + k / 100


@pytest.mark.parametrize("options", [{}, {"window_size": 4}], ids=str)
def test_bidirectional_calls_and_heads_against_loops(options: dict) -> None:
    """A rule of each head, and scores of -inf, from which nothing may be left."""
    plain = Options(num_groups=1, causal=False, scheme=SCHEMES["t5 bidirectional"], **options)
    module = build(plain, "MQA", mask_rule=PerHead(4), score_rule=near)
    wanted = replace(plain, shows=per_head_by_loops, changed=near_by_loops)
    run_conversation(module, wanted, 2, CALLS)


@pytest.mark.slow
@settings(max_examples=200)
@given(
    module_options(),
    conversations(),
    st.sampled_from((torch.float64, torch.float32)),
    st.sampled_from((None, "dilated", "per head")),
    st.sampled_from((None, "near", "capped")),
    st.sampled_from((0, 16)),
)
def test_any_conversation(
    built: tuple[str, Options],
    conversation: tuple[int, list[Call]],
    dtype: torch.dtype,
    mask: str | None,
    score: str | None,
    fewest: int,
) -> None:
    """Any module, any calls, under any pair of rules."""
    kind, options = built
    batch, calls = conversation
    masks = {"dilated": (dilated, dilated_by_loops), "per head": (PerHead(options.num_heads), per_head_by_loops)}
    scores = {"near": (near, near_by_loops), "capped": (capped, lambda score, *_: 2 * math.tanh(score / 2))}
    (mask_rule, shows), (score_rule, changed) = masks.get(mask, (None, None)), scores.get(score, (None, None))
    module = build(options, kind, dtype, mask_rule=mask_rule, score_rule=score_rule)
    with tuned(min_row_tokens=fewest):
        run_conversation(module, replace(options, shows=shows, changed=changed), batch, calls)


def capped(scores: Tensor, *_: Tensor) -> Tensor:
    return 2 * torch.tanh(scores / 2)


@pytest.mark.parametrize("options", [{}, {"window_size": 70, "num_sinks": 2}], ids=str)
@torch.inference_mode()
def test_blocks_of_queries_and_splits(options: dict) -> None:
    plain = Options(num_groups=2, scheme=SCHEMES["rotary halves"], **options)
    # A method, since a module inside of the attention has padded rows laid out.
    module = build(plain, mask_rule=dilated, score_rule=Decay(4).forward).float()
    assert_splits_change_nothing(module)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
@torch.inference_mode()
def test_flex_attention_gives_the_same(rows: int) -> None:
    """Many blocks of queries, float32, with the functions of flex_attention themselves."""
    heads, groups, length = 4, 2, 300
    decay = Decay(heads).float()
    module = GroupQueryAttention(32, heads, groups, True, mask_rule=dilated, score_rule=decay)
    x = torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(3))

    def mask_mod(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & dilated(q, k)

    def score_mod(score: Tensor, _: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return 2 * torch.tanh(score / 2) - decay.rate[h, 0, 0] * torch.log1p((q - k).clamp(min=0).float())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not compiled: it forms all scores
        blocks = create_block_mask(mask_mod, None, None, length, length, device="cpu")
        theirs = flex_attention(module.query(x), *module.key_value(x), score_mod, blocks, enable_gqa=True)
    assert_same(module(x), module.out(theirs), 2e-6)
    module.score_rule = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = flex_attention(module.query(x), *module.key_value(x), None, blocks, enable_gqa=True)
    assert_same(module(x), module.out(theirs), 2e-6)
    module.use_kv_cache = True
    assert_same(run_chunks(module, x, (1, 280, 1, 18)), module.out(theirs), 2e-6)


def test_gradients_are_those_of_one_call_and_finite() -> None:
    """Through cached chunks; a query that sees nothing, and later keys whose scores are NaN."""
    found = []
    for chunks in ((12,), (5, 1, 6)):
        module = build(Options(num_groups=2, window_size=5, num_sinks=1), mask_rule=dilated, score_rule=Smooth())
        x = tokens(2, 12, 16).requires_grad_()
        out = run_chunks(module, x, chunks)
        found.append(torch.autograd.grad(out.square().sum(), [x, *module.parameters()]))
        assert module.score_rule.slope is dict(module.named_parameters())["score_rule.slope"]
    assert_same(*found)
    assert all(each.isfinite().all() and each.any() for each in found[0])


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, scores: Tensor, q_position: Tensor, k_position: Tensor) -> Tensor:
        changed = scores * torch.exp(-self.slope * (q_position - k_position).abs())
        return changed.masked_fill(k_position > q_position, torch.nan)


TRACED = [{}, {"window_size": 3, "num_sinks": 2, "scheme": SCHEMES["alibi"]}]


@pytest.mark.parametrize("options", TRACED, ids=str)
def test_transformed_calls(options: dict) -> None:
    module = build(Options(num_groups=2, cached=False, **options), mask_rule=dilated, score_rule=Smooth())
    x, mask = tokens(2, 11, 16), padding([(0, 11), (2, 5)], 11)
    rows = torch.func.vmap(lambda each, real: module(each, attention_mask=real))(x.unsqueeze(1), mask.unsqueeze(1))
    assert_same(rows.squeeze(1), module(x, attention_mask=mask))


@pytest.mark.slow
@pytest.mark.parametrize("options", TRACED, ids=str)
def test_compiled_calls(options: dict) -> None:
    """One graph uncached, and over a cache of a frozen layout; `torch.export`."""
    plain = Options(num_groups=2, cached=False, **options)
    rules = {"mask_rule": dilated, "score_rule": Smooth()}
    module, mask, x = build(plain, **rules), padding([(0, 11), (2, 5)], 11), tokens(2, 11, 16)
    expected, weights = module(x, attention_mask=mask, return_weights=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, attention_mask=mask, return_weights=True), (expected, weights))
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
        torch.testing.assert_close(exported(x), module(x))
        stepped = build(replace(plain, cached=True), max_cache_length=16, **rules)
        outputs = [stepped(x[:, :3])]
        stepped.kv_cache.freeze_layout()
        step = torch.compile(stepped.eval(), backend="aot_eager", fullgraph=True)
        outputs += [step(each) for each in x[:, 3:].split(1, 1)]
    assert_same(torch.cat(outputs, 1), module(x))
    torch._dynamo.reset()


@torch.inference_mode()
def test_positions_after_compress_are_those_of_the_text() -> None:
    plain = Options(num_groups=2, scheme=SCHEMES["rotary halves"])
    module = build(plain, mask_rule=dilated, score_rule=Decay(4))
    wanted = replace(plain, shows=dilated_by_loops, changed=decay_by_loops(module.score_rule.rate))
    oracle = EditableConversation(module, wanted)
    for number, length in enumerate((9, 1, 4, 1)):
        x = tokens(2, length, 16, seed=number)
        assert_same(module(x), oracle.call(x)[0])
        if length > 1:
            module.kv_cache.compress(4, KeyNorm())
            oracle = oracle.compressed(4, lambda token, group: -sum(number**2 for number in token.keys[group]))
    module.cache_budget = (5, KeyNorm())
    assert module(tokens(2, 3, 16)).isfinite().all()


@torch.inference_mode()
def test_rows_that_share_a_prefix() -> None:
    module = build(Options(num_groups=2), mask_rule=dilated, score_rule=near)
    x = tokens(1, 9, 16)
    module(x)
    module.kv_cache.select([0, 0, 0])
    new = tokens(3, 4, 16, seed=1)
    together = run_chunks(module, new, (1, 3))
    for row in range(3):
        module.kv_cache = None
        whole = module(torch.cat((x, new[row : row + 1]), 1))
        assert_same(together[row : row + 1], whole[:, 9:])


class Counting:
    """`dilated`, and the last query position of each row in each call of it."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, q_position: Tensor, k_position: Tensor) -> Tensor:
        assert min(q_position.min(), k_position.min()) >= 0
        self.asked.append(q_position.amax((1, 2, 3)).tolist())
        return dilated(q_position, k_position)


@torch.inference_mode()
def test_layers_with_one_rule_ask_it_once() -> None:
    rule = Counting()

    def block(window: int | None) -> DecoderBlock:
        attention = MultiHeadAttention(16, 4, True, True, window_size=window, mask_rule=rule)
        return DecoderBlock(attention, FeedForward(16, 16), RMSNorm)

    stack = BlockStack([block(None) for _ in range(3)], RMSNorm(16)).eval()
    x, mask = torch.randn(2, 9, 16), padding([(0, 6), (3, 3)], 6)
    outputs = [stack(x[:, :6], attention_mask=mask)]
    assert rule.asked == [[5, 2]], "positions of tokens alone, also in the place of padding"
    outputs += [stack(x[:, i : i + 1]) for i in range(6, 9)]
    assert rule.asked[1:] == [[6, 3], [7, 4], [8, 5]]
    KVCache.from_model(stack).clear()
    later = torch.cat((mask, torch.ones(2, 3, dtype=torch.bool)), 1)
    torch.testing.assert_close(stack(x, attention_mask=later), torch.cat(outputs, 1))


def test_state_copies_and_conversions_have_the_rules() -> None:
    module = build(Options(num_groups=2), mask_rule=dilated, score_rule=Smooth())
    assert "score_rule.slope" in module.state_dict()
    assert "mask_rule=<function dilated" in repr(module)
    assert "(score_rule): Smooth()" in repr(module)
    x = tokens(1, 6, 16)
    with torch.no_grad():
        first = module(x[:, :3])
        others = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
        rest = module(x[:, 3:])
        for other in others:
            assert other.score_rule is not module.score_rule
            assert_same(other(x[:, 3:]), rest)
        assert_same(to_mha(module)(x), torch.cat((first, rest), 1))
        module.mask_rule = module.score_rule = None
        module.kv_cache = None
        assert (module(x)[:, 3:] - rest).abs().max() > 1e-3


def test_refusals_and_errors_change_nothing() -> None:
    with pytest.raises(ConfigurationError, match="mask_rule: expected None, a function or a module"):
        MultiHeadAttention(16, 4, mask_rule=3)
    with pytest.raises(ConfigurationError, match="score_rule: expected None, a function or a module"):
        MultiHeadAttention(16, 4, score_rule=Smooth)
    ruled = MultiHeadAttention(16, 4, mask_rule=dilated)
    with pytest.raises(ArgumentError, match="kv: expected None for a module with a mask_rule"):
        ruled(torch.zeros(1, 2, 16), torch.zeros(1, 3, 16))
    with pytest.raises(ConfigurationError, match="mask_rule=<function dilated"):
        to_torch(ruled)
    module = build(Options())
    x = tokens(2, 4, 16)
    before = module(x), cache_snapshot(module)
    for name, rule, error in (
        ("mask_rule", lambda q, k: (q - k).float(), DtypeError),
        ("mask_rule", lambda q, k: True, DtypeError),
        ("mask_rule", lambda q, k: (q == k).expand(-1, 3, -1, -1), ShapeError),
        ("score_rule", lambda scores, q, k: scores[..., :1], ShapeError),
        ("score_rule", lambda scores, q, k: scores > 0, DtypeError),
        ("score_rule", lambda scores, q, k: 1 / 0, ZeroDivisionError),
    ):
        setattr(module, name, rule)
        with pytest.raises(error, match="division" if error is ZeroDivisionError else name):
            module(x)
        setattr(module, name, None)
        assert cache_snapshot(module) == before[1]
