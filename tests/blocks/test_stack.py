"""Stack of blocks: construction, steps that are planned once, and refusals before anything changes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.blocks.loops import StackConversation
from tests.blocks.stacks import MIXED, READERS, WITH_SINKS, Layer, make, options_of
from tests.conversations import assert_same
from tests.setups import SCHEMES, fill, padding, position_of, tokens
from transformer import MultiHeadAttention
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock, FeedForward, RMSNorm, layer_kinds
from transformer.errors import ConfigurationError

STACKS = {"mixed": MIXED, "with sinks": WITH_SINKS, "readers": READERS}


KINDS = [(name, placement, "sequential") for name in STACKS for placement in ("before", "after", "both")]
KINDS += [("mixed", "before", "parallel"), ("with sinks", "before", "parallel_one_norm")]


@pytest.mark.parametrize(("name", "placement", "residual"), KINDS)
def test_by_loops(name: str, placement: str, residual: str) -> None:
    """Three layers that differ in window, sinks and heads, over four calls: whole, padded, one token, another mode."""
    layers = STACKS[name]
    stack = make(layers, placement=placement, residual=residual)
    conversation = StackConversation(stack, [options_of(layer, "rotary halves") for layer in layers], placement, "silu")
    source = {}
    if name == "readers":
        source = {"source": tokens(2, 4, 16, seed=9), "source_mask": padding([(0, 4), (1, 2)], 4)}
    with torch.no_grad():
        for step, (length, mode) in enumerate(((4, None), (3, None), (1, None), (2, True), (2, None))):
            x, mask = tokens(2, length, 16, seed=step), padding([(0, 3), (1, 1)], 3) if step == 1 else None
            out = stack(x, expanding_context=mode, attention_mask=mask, **source)
            out = out if mask is None else out.masked_fill(~mask[..., None], 0.0)
            assert_same(out, conversation.call(x, mask, mode, **source))


@pytest.mark.parametrize("schemes", [("t5 causal",) * 3, ("rotary halves", "rotary interleaved", "alibi")], ids=str)
def test_positions_of_its_own_in_each_layer(schemes: tuple[str, ...]) -> None:
    """Layers of one kind share a step, but not what their own position objects make of it: other tables of biases,
    other angles."""
    layers = [Layer(3, groups=2), Layer(3, groups=1), Layer(3)]
    options = [options_of(layer, scheme) for layer, scheme in zip(layers, schemes, strict=True)]
    stack = make(layers, shared=False)
    for block, own in zip(stack.blocks, options, strict=True):
        block.attention.position = position_of(own)
    fill(stack, 2)
    stack.double()
    conversation = StackConversation(stack, options, "before", "silu")
    with torch.no_grad():
        for step, length in enumerate((4, 1, 2)):
            x = tokens(2, length, 16, seed=step)
            assert len(set(map(id, stack.plan(x)))) == 1
            assert_same(stack(x), conversation.call(x))


@pytest.mark.parametrize(
    ("pattern", "layers", "kinds"),
    [
        ("a", 1, "a"),
        ("a", 3, "aaa"),
        ("a b", 2, "ab"),
        ("a b", 5, "ababa"),
        ("a a b", 6, "aabaab"),
        ("a a b", 4, "aaba"),
        ("  a\n b\t", 3, "aba"),
    ],
)
def test_layer_kinds(pattern: str, layers: int, kinds: str) -> None:
    assert layer_kinds(pattern, layers) == tuple(kinds)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [("", 3), (None, 3), ("  ", 3), ("a b", 1), ("a", 0), ("a", -1), ("a", 2.0), ("a", True), ("a", "2")],
)
def test_layer_kinds_refused(pattern: str, layers: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^pattern: expected .*num_layers=.*, got "):
        layer_kinds(pattern, layers)


def encoder(width: int = 8, **options: object) -> EncoderBlock:
    return EncoderBlock(MultiHeadAttention(width, 2, **options), FeedForward(width, 4), RMSNorm)


def test_from_pattern_makes_each_layer_anew() -> None:
    makers = {"sliding": partial(encoder, window_size=2), "full": encoder}
    norm = RMSNorm(8)
    stack = BlockStack.from_pattern("sliding sliding full", 5, norm, **makers)
    assert [block.attention.window_size for block in stack.blocks] == [2, 2, None, 2, 2]
    assert len(set(map(id, stack.blocks))) == 5
    assert stack.norm is norm
    assert BlockStack.from_pattern("full", 2, full=encoder).norm is None


@pytest.mark.parametrize(
    ("pattern", "layers", "kinds"),
    [("a b", 4, "a"), ("a", 4, "ab"), ("a b", 4, "ac"), ("a", 4, ""), ("a b", 1, "ab"), ("", 4, "a")],
)
def test_from_pattern_refused(pattern: str, layers: int, kinds: str) -> None:
    """A name without a maker, a maker without a layer, more names than layers."""
    made = []
    with pytest.raises(ConfigurationError, match=r"^pattern: expected .*, got "):
        BlockStack.from_pattern(pattern, layers, **{kind: lambda: made.append(1) or encoder() for kind in kinds})
    assert not made


@pytest.mark.parametrize(
    "blocks",
    [[], [encoder(), encoder(16)], [encoder(), nn.Linear(8, 8)], [encoder().attention], [None]],
    ids=["none", "widths", "another module", "attention", "None"],
)
def test_blocks_that_cannot_stand_above_each_other(blocks: list) -> None:
    with pytest.raises(ConfigurationError, match=r"^blocks: expected .*, got "):
        BlockStack(blocks)


def test_blocks_may_come_from_a_generator_and_of_both_kinds() -> None:
    decoder = DecoderBlock(MultiHeadAttention(8, 4), nn.Identity(), RMSNorm)
    stack = BlockStack(block for block in (encoder(), decoder))
    assert stack(torch.ones(1, 3, 8)).shape == (1, 3, 8)


def test_one_step_for_each_kind() -> None:
    """Kinds differ in the visible keys of a mode and in the cache, not in the number of heads."""
    layers = [Layer(2, groups=1), Layer(2, groups=4), Layer(None), Layer(2, 1), Layer(3), Layer(2, groups=2)]
    stack = make(layers)
    # Expanding, windows play no part; sliding, the layer without one takes the length of the longest row, 3.
    for mode, kinds in ((None, 4), (True, 2), (False, 3)):
        steps = stack.plan(tokens(2, 3, 16), mode, padding([(0, 3), (1, 2)], 3))
        assert len(steps) == 6
        assert steps[0] is steps[1]
        assert steps[0] is steps[5]
        assert len(set(map(id, steps))) == kinds
    steps = make([Layer(), Layer()]).plan(tokens(1, 2, 16))
    assert steps[0] is steps[1]
    plain = BlockStack([*make([Layer()], causal=False).blocks, *make([Layer()]).blocks])
    assert len(set(map(id, plain.plan(tokens(1, 2, 16))))) == 2


def test_steps_from_plan_are_those_of_a_call() -> None:
    for mode in (None, True):
        planned, own = make(), make()
        for step, length in enumerate((4, 1, 3)):
            x, mask = tokens(2, length, 16, seed=step), padding([(0, length), (0, 1)], length)
            steps = planned.plan(x, mode, mask)
            expected = own(x, expanding_context=mode, attention_mask=mask)
            assert torch.equal(planned(x, steps=steps), expected)


class Looks(TorchDispatchMode):
    """Counts what makes the host wait for numbers of a device: on the CPU the calls that do are the same."""

    WAITING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            self.waited.append(name)
        return function(*args, **(kwargs or {}))


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the methods that bring numbers to the host, one for each time that they run from now on."""
    seen: list[str] = []
    for name in ("cpu", "tolist", "item", "numpy", "__bool__", "__int__"):

        def look(self: Tensor, *arguments: object, name: str = name, way: object = getattr(Tensor, name)) -> object:
            seen.append(name)
            return way(self, *arguments)

        monkeypatch.setattr(Tensor, name, look)
    return seen


@pytest.mark.parametrize("name", STACKS)
def test_the_mask_is_looked_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For three layers of two or three kinds, with and without a source: one copy to the host, counted once."""
    stack, source = make(STACKS[name]), {"source": tokens(2, 4, 16, seed=9)} if name == "readers" else {}
    seen = count_looks(monkeypatch)
    with torch.no_grad():
        for step, length in enumerate((4, 1, 3)):
            seen.clear()
            stack(tokens(2, length, 16, seed=step), attention_mask=padding([(0, length), (0, 1)], length), **source)
            assert seen == ["cpu", "tolist"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", STACKS)
def test_decoding_without_a_mask_waits_for_nothing(name: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens and a few at once, past the windows: the host asks for no number of a device, and compares none."""
    stack, source = make(STACKS[name], scheme), {"source": tokens(2, 4, 16, seed=9)} if name == "readers" else {}
    stack_of_nothing = make(STACKS[name], scheme).to("meta")
    chunks = [tokens(2, length, 16, seed=length) for length in (4, 1, 1, 1, 1, 1, 3, 2)]
    seen, looks = count_looks(monkeypatch), Looks()
    with torch.no_grad():
        stack(chunks[0], **source)
        seen.clear()
        with looks:
            for x in chunks[1:]:
                stack(x, **source)
        # Tensors of this device have no numbers: a call that asks for one fails.
        for x in chunks[1:]:
            stack_of_nothing(x.to("meta"), **{key: tensor.to("meta") for key, tensor in source.items()})
    assert (seen, looks.waited) == ([], [])
