"""Padding in a stack: which blocks are given the flat run of the real tokens, and that nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from tests.blocks.stacks import MIXED, READERS, make
from tests.conversations import assert_same
from tests.setups import fill, padding, tokens
from transformer import DecoderOnlyTransformer
from transformer.blocks import BlockStack, EncoderBlock, FeedForward, RMSNorm
from transformer.kernels import tuned

SPANS = [(0, 4), (2, 5), (3, 0), (6, 1)]
LENGTH = 7
COUNT = sum(count for _, count in SPANS)
ROWS, FLAT = (len(SPANS), LENGTH), (1, COUNT)

seen: list[tuple[int, ...]] = []


@pytest.fixture(autouse=True)
def forget() -> None:
    seen.clear()


class Seeing(FeedForward):
    """A network that says it works token by token, and keeps the shapes that it is given."""

    token_wise = True

    def forward(self, x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[:2]))
        return super().forward(x)


class Own(FeedForward):
    """One of a user's own, which says nothing: it may look at neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[:2]))
        return super().forward(x)


class Wrapped(nn.Module):
    """A wrapper around a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **keywords: object) -> Tensor:
        out: Tensor = self.block(x, **keywords)
        return out


def stack(*networks: type[FeedForward], causal: bool = False) -> BlockStack:
    """Blocks of MIXED with these networks in the place of their own."""
    made = make(MIXED[: len(networks)], cached=False, causal=causal)
    for index, (block, network) in enumerate(zip(made.blocks, networks, strict=True)):
        block.feed_forward = network(16, 6).double()
        fill(block.feed_forward, index)
    return made


def hooked(block: EncoderBlock) -> None:
    block.register_forward_hook(lambda *_: None)


def hooked_inside(block: EncoderBlock) -> None:
    block.attention.q_proj.register_forward_pre_hook(lambda *_: None)


def hooked_backward(block: EncoderBlock) -> None:
    block.feed_forward_residual.norm_before.register_full_backward_hook(lambda *_: None)


def parametrized(block: EncoderBlock) -> None:
    nn.utils.parametrizations.weight_norm(block.feed_forward.up_proj)


def forward_of_its_own(block: EncoderBlock) -> None:
    block.attention.out_proj.forward = partial(nn.Linear.forward, block.attention.out_proj)


def norm_over_rows(block: EncoderBlock) -> None:
    block.attention_residual.norm_before = nn.LayerNorm((LENGTH, 16)).double()


def norm_of_its_own(block: EncoderBlock) -> None:
    class Norm(RMSNorm):
        pass

    block.attention_residual.norm_before = Norm(16).double()


def compiled(block: EncoderBlock) -> None:
    block.feed_forward.compile(backend="eager")


CHANGES = (
    hooked,
    hooked_inside,
    hooked_backward,
    parametrized,
    forward_of_its_own,
    norm_over_rows,
    norm_of_its_own,
    compiled,
)


@torch.no_grad()
def test_what_each_block_is_given() -> None:
    """A block with a part of a user's own is given rows, its neighbours the real tokens; padding comes back as 0."""
    mask, x = padding(SPANS, LENGTH), tokens(*ROWS, 16)
    made = stack(Seeing, Own, Seeing)
    out = made(x, attention_mask=mask)
    assert seen == [FLAT, ROWS, FLAT]
    assert not out[~mask].any()
    seen.clear()
    for row, span in enumerate(mask):
        if span.any():
            assert_same(out[row, span], made(x[row, span][None])[0])
    seen.clear()
    made(x)
    made(x, attention_mask=torch.ones(ROWS, dtype=torch.bool))
    assert set(seen) == {ROWS}, "without padding nothing is taken out"


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_block_is_given_rows(change: Callable[[EncoderBlock], None]) -> None:
    made = stack(Seeing, Seeing)
    mask, x = padding(SPANS, LENGTH), tokens(*ROWS, 16)
    made(x, attention_mask=mask)
    assert set(seen) == {FLAT}
    change(made.blocks[0])
    seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made(x, attention_mask=mask)
    assert seen == [ROWS, FLAT]


@torch.no_grad()
def test_a_wrapped_block_and_hooks_of_all_modules() -> None:
    mask, x = padding(SPANS, LENGTH), tokens(*ROWS, 16)
    made = stack(Seeing, Seeing)
    expected = made(x, attention_mask=mask)
    made.blocks[1] = Wrapped(made.blocks[1])
    seen.clear()
    assert_same(made(x, attention_mask=mask)[mask], expected[mask])
    assert seen == [FLAT, ROWS]
    shapes = []
    handle = global_hooks.register_module_forward_hook(lambda _, given, out: shapes.append(given[0].shape[:2]))
    try:
        made(x, attention_mask=mask)
    finally:
        handle.remove()
    assert ROWS in map(tuple, shapes)
    assert FLAT not in map(tuple, shapes[1:3])


@pytest.mark.parametrize("rows", [0, 10**6])
@pytest.mark.parametrize("layers", [MIXED, READERS])
def test_gradients(layers: tuple, rows: int) -> None:
    """Of a padded batch: those of each row alone, added; none at padding, whatever is there."""
    made = make(layers, "t5 causal", cached=False)
    mask, x = padding(SPANS, LENGTH), tokens(*ROWS, 16)
    source = {"source": tokens(len(SPANS), 3, 16, seed=5)} if layers is READERS else {}
    weight = tokens(*ROWS, 16, seed=7)
    for row, span in enumerate(mask):
        if span.any():
            own = {name: each[row : row + 1] for name, each in source.items()}
            (made(x[row, span][None], **own) * weight[row, span]).sum().backward()
    alone = {name: each.grad for name, each in made.named_parameters()}
    made.zero_grad()
    given = x.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    with tuned(min_row_tokens=rows):
        out = made(given, attention_mask=mask, **source)
    (out.where(mask[..., None], 0.0) * weight).sum().backward()
    for name, each in made.named_parameters():
        torch.testing.assert_close(each.grad, alone[name], rtol=0, atol=1e-10)
    assert not given.grad[~mask].any()
    assert given.grad.isfinite().all()


@torch.no_grad()
def test_additional_outputs_are_of_rows() -> None:
    """Weights [B, H, L, S] and states [B, L, E], as of blocks that are given rows."""
    mask, x = padding(SPANS, LENGTH), tokens(*ROWS, 16)
    source = {"source": tokens(len(SPANS), 3, 16, seed=5), "source_mask": padding([(0, 3), (1, 1), (0, 2), (2, 1)], 3)}
    made = make(READERS, cached=False)
    flat = made(x, attention_mask=mask, output_attentions=True, output_hidden_states=True, **source)
    hooks = [block.register_forward_hook(lambda *_: None) for block in made.blocks]
    rows = made(x, attention_mask=mask, output_attentions=True, output_hidden_states=True, **source)
    for hook in hooks:
        hook.remove()
    for name in ("attentions", "cross_attentions"):
        assert_same(getattr(flat, name), getattr(rows, name))
    assert_same([states[mask] for states in flat.hidden_states], [states[mask] for states in rows.hidden_states])
    assert all(states.shape == x.shape for states in flat.hidden_states)
    assert_same(flat.states, made(x, attention_mask=mask, **source))


@pytest.mark.parametrize("rows", [0, 10**6])
@torch.no_grad()
def test_steps_that_a_caller_gives_serve_again(rows: int) -> None:
    """Of a stack with a learned bias, which changes between two calls with the same steps."""
    mask, x = padding(SPANS, LENGTH), tokens(*ROWS, 16)
    made = make(MIXED, "t5 causal", cached=False)
    steps = made.plan(x, None, mask)
    with tuned(min_row_tokens=rows):
        for _ in range(2):
            assert_same(made(x, steps=steps), made(x, attention_mask=mask))
            for parameter in made.parameters():
                parameter.mul_(1.1)


@torch.inference_mode()
def test_rows_of_a_running_batch() -> None:
    """Rows that end, and others that go on: a step computes those that have a token."""
    model = DecoderOnlyTransformer(31, 16, 2, 8, 2).double().eval().enable_cache()
    fill(model, 3)
    for block in model.decoder.blocks:
        block.feed_forward = Seeing(16, 8).double()
    ids = torch.randint(31, (4, 3), generator=torch.Generator().manual_seed(0))
    masks = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    for column in range(3):
        model(ids[:, column : column + 1], masks[:, column : column + 1])
    assert seen == [(1, 3), (1, 3), (1, 2), (1, 2), (1, 3), (1, 3)]
    assert model.kv_cache.lengths.tolist() == [3, 2, 2, 1]


@pytest.mark.parametrize("keys", [0, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_rows_of_16_bits(dtype: torch.dtype, keys: int, grad: bool) -> None:
    """Row by row, as float32 and as they are: the dtype stays, and errors are those of rounding."""
    mask = padding(SPANS, LENGTH)
    made, exact = (make(MIXED, cached=False, dtype=each) for each in (dtype, torch.float64))
    x = tokens(*ROWS, 16).to(dtype)
    exact.load_state_dict(made.state_dict())
    with torch.set_grad_enabled(grad), tuned(min_row_tokens=0, max_upcast_keys=keys):
        out = made(x, attention_mask=mask)
    assert out.dtype is dtype
    right = exact(x.double(), attention_mask=mask)
    assert (out.double() - right)[mask].abs().max() <= 8 * torch.finfo(dtype).eps * right[mask].abs().max()
