"""Encoder and decoder block, compared with plain loops; and branches that cannot share one residual stream."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.blocks.loops import StackConversation
from tests.blocks.stacks import Layer, make, options_of
from tests.conversations import assert_same
from tests.oracle import Options
from tests.setups import build, padding, tokens
from transformer import MultiHeadAttention
from transformer.blocks import DecoderBlock, EncoderBlock, FeedForward, GatedFeedForward, RMSNorm
from transformer.errors import ArgumentError, ConfigurationError

PLACEMENTS = ("before", "after", "both")
KINDS = {
    "encoder": (Layer(groups=2), False),
    "encoder with a window": (Layer(2), False),
    "decoder": (Layer(groups=1), True),
    "decoder with a window": (Layer(2, 1, groups=2), True),
    "decoder with a source": (Layer(3, reads=True), True),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_by_loops(kind: str, placement: str, padded: bool) -> None:
    """A block called by itself, three times in a row, makes its own step."""
    layer, causal = KINDS[kind]
    options = options_of(layer, "rotary halves", causal, causal)
    stack = make([layer], causal=causal, cached=causal, placement=placement)
    stack.norm = None
    conversation = StackConversation(stack, [options], placement, "silu")
    (block,) = stack.blocks
    source = {"source": tokens(2, 4, 16, seed=9), "source_mask": padding([(0, 4), (1, 2)], 4)} if layer.reads else {}
    for step, length in enumerate((4, 1, 3)):
        x = tokens(2, length, 16, seed=step)
        mask = padding([(0, length), (length // 2, 1)], length) if padded else None
        out = block(x, attention_mask=mask, **source)
        shown = out if mask is None else out.masked_fill(~mask[..., None], 0.0)
        assert_same(shown, conversation.call(x, mask, **source))


@pytest.mark.parametrize("mode", [None, True, False])
def test_the_mode_is_handed_down(mode: bool | None) -> None:
    """Together with a mask; a step gives the same."""
    layer = Layer(2, groups=2)
    stacks = [make([layer]) for _ in range(3)]
    conversation = StackConversation(stacks[0], [options_of(layer, "rotary halves")], "before", "silu")
    for stack in stacks:
        stack.norm = None
    named, placed, planned = (stack.blocks[0] for stack in stacks)
    for step in range(2):
        x, mask = tokens(2, 5, 16, seed=step), padding([(0, 5), (2, 3)], 5)
        expected = conversation.call(x, mask, mode)[mask]
        assert_same(named(x, expanding_context=mode, attention_mask=mask)[mask], expected)
        assert_same(placed(x, None, mode, attention_mask=mask)[mask], expected)
        assert_same(planned(x, step=planned.attention.plan(x, mode, mask))[mask], expected)


def record_added(into: dict[str, Tensor], name: str, _: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
    into[name] = out - given[0]


def test_dropout_reaches_every_residual() -> None:
    """What each of the branches adds is dropped while training, and nothing otherwise."""
    attention = partial(MultiHeadAttention, 8, 2)
    encoder = EncoderBlock(attention(), FeedForward(8, 8), RMSNorm, dropout=0.9)
    decoder = DecoderBlock(attention(), FeedForward(8, 8), RMSNorm, cross_attention=attention(), dropout=0.9)
    x = tokens(1, 40, 8, dtype=torch.float32)
    for block, source in ((encoder, ()), (decoder, (x,))):
        inputs: dict[str, Tensor] = {}
        for name in ("feed_forward", "cross_attention", "attention"):
            if hasattr(block, f"{name}_residual"):
                residual = getattr(block, f"{name}_residual")
                residual.register_forward_hook(partial(record_added, inputs, name))
        block.train()(x, *source)
        assert len(inputs) == 2 + len(source)
        assert all(0.8 < (added == 0).float().mean() < 0.98 for added in inputs.values())
        block.eval()(x, *source)
        assert not any((added == 0).any() for added in inputs.values())


def attention(**options: object) -> MultiHeadAttention:
    return MultiHeadAttention(**{"embed_dim": 8, "num_heads": 2, **options})


SHARED = attention()

REFUSED = [
    ("attention", {"attention": nn.Linear(8, 8)}),
    ("attention", {"attention": None}),
    ("attention", {"attention": nn.MultiheadAttention(8, 2)}),
    ("attention", {"attention": attention(kv_dim=5)}),
    ("feed_forward", {"feed_forward": torch.relu}),
    ("feed_forward", {"feed_forward": None}),
    ("feed_forward", {"feed_forward": FeedForward(6, 8)}),
    ("feed_forward", {"feed_forward": GatedFeedForward(16, 8)}),
    ("placement", {"placement": "pre"}),
    ("dropout", {"dropout": 1.0}),
]
CROSS_REFUSED = [
    ("cross_attention", {"cross_attention": nn.Linear(8, 8)}),
    ("cross_attention", {"cross_attention": attention(embed_dim=16)}),
    ("cross_attention", {"cross_attention": attention(apply_causal_mask=True)}),
    ("cross_attention", {"cross_attention": SHARED, "attention": SHARED}),
    ("residual", {"residual": "serial"}),
    ("residual", {"residual": "parallel", "placement": "both"}),
    ("residual", {"residual": "parallel_one_norm", "cross_attention": attention()}),
]


@pytest.mark.parametrize(("name", "options"), [*REFUSED, *CROSS_REFUSED], ids=lambda value: str(value)[:60])
def test_refused(name: str, options: dict) -> None:
    arguments = {"attention": attention(), "feed_forward": FeedForward(8, 6), "norm": RMSNorm, **options}
    for kind in (DecoderBlock,) if (name, options) in CROSS_REFUSED else (DecoderBlock, EncoderBlock):
        with pytest.raises(ConfigurationError, match=f"^{name}: expected .*, got "):
            kind(**arguments)


def test_the_neighbours_of_what_is_refused_work() -> None:
    """Any module is a feed-forward network, and a source may have any width."""
    x, source = torch.ones(1, 2, 8), torch.ones(1, 3, 5)
    block = DecoderBlock(attention(), nn.Sequential(nn.Linear(8, 8)), RMSNorm, cross_attention=attention(kv_dim=5))
    assert block(x, source).shape == EncoderBlock(attention(), nn.Identity(), RMSNorm)(x).shape == x.shape


@pytest.mark.parametrize(
    ("name", "reads", "arguments"),
    [
        ("source", True, {}),
        ("source", True, {"source_mask": torch.ones(1, 3)}),
        ("source", False, {"source": torch.ones(1, 3, 16)}),
        ("source_mask", False, {"source_mask": torch.ones(1, 3)}),
    ],
    ids=str,
)
def test_a_source_that_is_missing_or_has_no_reader_is_refused(name: str, reads: bool, arguments: dict) -> None:
    cross = build(Options(causal=False)) if reads else None
    module = build(Options())
    block = DecoderBlock(module, nn.Identity(), nn.LayerNorm, cross_attention=cross).double()
    with pytest.raises(ArgumentError, match=f"^{name}: expected .*, got "):
        block(tokens(1, 2, 16), **arguments)
    assert module.kv_cache is None
