"""Gradients of a whole stack: equal to finite differences, equal in chunks, and independent of padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.blocks.stacks import MIXED, READERS, WITH_SINKS, Layer, make, run_chunks
from tests.conversations import NAN, assert_same
from tests.setups import padding, tokens
from transformer.blocks import BlockStack

SMALL = {"embed_dim": 2, "num_heads": 2, "head_dim": 2}
STACKS = {
    "sliding and full": (Layer(2, groups=1), Layer(None, groups=2)),
    "sinks": (Layer(1, 1, groups=2), Layer(None, groups=1)),
    "reads": (Layer(2, groups=1, reads=True), Layer(None, groups=1, reads=True)),
}


def small(name: str, scheme: str, cached: bool, placement: str) -> BlockStack:
    return make(STACKS[name], scheme, cached=cached, placement=placement, **SMALL)


def forget(stack: BlockStack) -> None:
    for block in stack.blocks:
        block.attention.kv_cache = None


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "two calls"])
@pytest.mark.parametrize(("scheme", "placement"), [("none", "both"), ("t5 causal", "before"), ("alibi", "after")])
@pytest.mark.parametrize("name", STACKS)
def test_gradcheck(name: str, scheme: str, placement: str, cached: bool) -> None:
    """With respect to every token, the source, and the weights of the lowest layer; one row is padded."""
    stack = small(name, scheme, cached, placement)
    mask = padding([(0, 2), (1, 1)], 2)
    weights = [stack.blocks[0].attention.k_proj.weight, *stack.blocks[0].attention_residual.parameters()]
    reads = name == "reads"

    def conversation(first: Tensor, second: Tensor, source: Tensor, *_: Tensor) -> Tensor:
        forget(stack)
        read = {"source": source} if reads else {}
        if not cached:
            out = stack(torch.cat([first, second], 1), attention_mask=torch.cat([mask, ~mask | mask], 1), **read)
            return out.masked_fill(~torch.cat([mask, ~mask | mask], 1)[..., None], 0.0)
        start = stack(first, attention_mask=mask, **read).masked_fill(~mask[..., None], 0.0)
        return torch.cat([start, stack(second, **read)], 1)

    inputs = [tokens(2, 2, 2, seed=seed).requires_grad_() for seed in range(3)]
    inputs[2].requires_grad_(reads)
    assert torch.autograd.gradcheck(conversation, (*inputs, *weights))


def slopes(stack: BlockStack, x: Tensor, out: Tensor, *more: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [x, *more, *stack.parameters()], tokens(*out.shape, seed=77)))


@pytest.mark.parametrize("lengths", [(4, 1, 3), (1,) * 8, (3, 5)], ids=str)
@pytest.mark.parametrize("layers", [MIXED, WITH_SINKS, READERS], ids=["mixed", "sinks", "reads"])
def test_gradients_of_chunks_are_those_of_one_call(layers: tuple[Layer, ...], lengths: tuple[int, ...]) -> None:
    """Every parameter of every layer, the tokens and the source: a loss on a later chunk reaches all that came
    before through the caches of all layers."""
    plain, stack = make(layers, "t5 causal", cached=False), make(layers, "t5 causal")
    x = tokens(2, 8, 16).requires_grad_()
    more = [tokens(2, 4, 16, seed=5).requires_grad_()] if layers is READERS else []
    source = {"source": more[0]} if more else {}
    expected = slopes(plain, x, plain(x, **source), *more)
    assert all(gradient.any() for gradient in expected)
    for actual, wanted in zip(slopes(stack, x, run_chunks(stack, x, lengths, **source), *more), expected, strict=True):
        assert_same(actual, wanted, atol=1e-9)


def test_a_later_loss_reaches_through_the_layers() -> None:
    """Two windows of 2 above each other see a token farther than one of them: the chunk at 2 reaches positions 0 to 2,
    and a full layer reaches everything."""
    x = [tokens(1, 1, 16, seed=step).requires_grad_() for step in range(4)]
    reached = []
    for layers in ((Layer(2),), (Layer(2), Layer(2)), (Layer(2), Layer(None))):
        stack = make(layers)
        for token in x:
            out = stack(token)
        reached.append([bool(gradient.any()) for gradient in torch.autograd.grad(out.sum(), x, allow_unused=False)])
    assert reached == [[False, False, True, True], [False, True, True, True], [True] * 4]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layers", [MIXED, WITH_SINKS], ids=["mixed", "sinks"])
def test_numbers_in_padding_reach_no_gradient(layers: tuple[Layer, ...], cached: bool) -> None:
    """Any finite numbers at padding, if the loss leaves padding out."""
    mask, found = padding([(1, 3), (0, 2)], 4), []
    for number in (0.0, -7.0):
        stack = make(layers, cached=cached)
        x = tokens(2, 4, 16).masked_fill(~mask[..., None], number).requires_grad_()
        out = torch.cat([stack(x, attention_mask=mask)[mask] for _ in range(2)])
        found.append(torch.autograd.grad(out.square().sum(), [x, *stack.parameters()]))
        assert not found[-1][0][~mask].any()
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


def test_nan_in_padding_reaches_no_gradient() -> None:
    """Issues: flash-attention#1745, vllm#641. 0 x NaN: as one attention module alone keeps it."""
    mask, stack = padding([(1, 3), (0, 2)], 4), make(MIXED)
    x = tokens(2, 4, 16).masked_fill(~mask[..., None], NAN).requires_grad_()
    out = stack(x, attention_mask=mask)[mask]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), [x, *stack.parameters()]))
