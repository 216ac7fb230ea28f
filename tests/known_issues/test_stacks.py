"""Positions, windows and sources in several layers: cases that one layer does not show."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.blocks.stacks import MIXED, Layer, cache_snapshots, make, run_chunks
from tests.conversations import assert_same, numbers
from tests.oracle_positions import Rotary
from tests.setups import SCHEMES, padding, tokens
from transformer.blocks import BlockStack
from transformer.errors import CacheStateError

CHUNKINGS = {"one by one": (1,) * 12, "one chunk": (12,), "prompt then tokens": (7, 1, 1, 1, 1, 1)}
LAYERS = (Layer(3, groups=2), Layer(None, groups=1), Layer(2, groups=4), Layer(5))


def silence(stack: BlockStack, but: int) -> None:
    """Leaves one layer through which tokens can reach each other: the attention of the others adds nothing."""
    for index, block in enumerate(stack.blocks):
        if index != but:
            for parameter in block.attention.out_proj.parameters():
                nn.init.zeros_(parameter)


def reached(lengths: tuple[int, ...], but: int | None, cached: bool = True, layers: tuple = LAYERS) -> list[int]:
    """The positions whose outputs another token at position 4 changes."""
    x = tokens(1, 12, 16)
    other = x.clone()
    other[:, 4] += 1.0
    stacks = [make(layers, cached=cached) for _ in range(2)]
    for stack in stacks:
        if but is not None:
            silence(stack, but)
    with torch.no_grad():
        a, b = (run_chunks(stack, sequence, lengths) for stack, sequence in zip(stacks, (x, other), strict=True))
    return (a != b).any(-1)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("lengths", CHUNKINGS.values(), ids=CHUNKINGS)
@pytest.mark.parametrize("only", range(4))
def test_each_layer_keeps_its_own_window(only: int, lengths: tuple[int, ...]) -> None:
    """Issues: hnet#20, nanochat#452, keras-hub#1738 #2186, flash-attn `MHA` with a window. Decoding ignored the window
    that prefill had applied. In a mixed stack each layer decodes with the window of its own kind, not with that of the
    layer before it, and the one without a window sees everything."""
    window = LAYERS[only].window or 12
    expected = list(range(4, min(4 + window, 12)))
    assert reached(lengths, only) == expected
    assert reached((12,), only, cached=False) == expected


@pytest.mark.parametrize("lengths", CHUNKINGS.values(), ids=CHUNKINGS)
def test_windows_add_up_over_the_layers(lengths: tuple[int, ...]) -> None:
    """Issues: transformers#39408, mlx-lm#390, x-transformers `max_attend_past` (one key too many). Each layer carries a
    token W - 1 positions on, and no layer one more; windows of 3, 1 and 2 reach three further."""
    assert reached(lengths, None, layers=(Layer(3), Layer(1, groups=1), Layer(2))) == [4, 5, 6, 7]


def heard_keys(stack: BlockStack) -> list[list[Tensor]]:
    """The keys of each layer before they are turned, [G * D] for each token that is fed from now on."""
    heard: list[list[Tensor]] = [[] for _ in stack.blocks]
    for block, own in zip(stack.blocks, heard, strict=True):
        block.attention.k_proj.register_forward_hook(partial(_hear, own))
    return heard


def _hear(own: list[Tensor], _module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> None:
    own.extend(out[0])


@pytest.mark.parametrize("scheme", ["rotary halves", "rotary partial interleaved"])
def test_every_layer_counts_every_token(scheme: str) -> None:
    """Issues: VeloxQuant-MLX#389 #171, transformers#33691 #35350, mlx-lm#1805. After eviction the position counter
    became the number of rows kept; or rotary was applied after the counter had moved. Layers that hold 3, all, 2 and 5
    tokens
    have seen the same number, and the keys in each stand turned by their positions, not by their slots, nor by where a
    layer below has gone on to."""
    stack, rotary = make(LAYERS, scheme), SCHEMES[scheme]
    assert isinstance(rotary, Rotary)
    heard, seen = heard_keys(stack), 0
    with torch.no_grad():
        for step, length in enumerate((2, 1, 6, 1, 1, 9, 1, 1)):
            stack(tokens(1, length, 16, seed=step))
            seen += length
            for block, layer, keys in zip(stack.blocks, LAYERS, heard, strict=True):
                cache = block.attention.kv_cache
                held = min(layer.window or seen, seen)
                assert (cache.length, cache.cached_length) == (seen, held)
                for slot, position in enumerate(range(seen - held, seen)):
                    raw = keys[position].view(layer.groups, 4).tolist()
                    expected = torch.tensor([rotary.rotate(key, position) for key in raw], dtype=torch.float64)
                    assert_same(cache["key"][0, :, slot], expected)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("scheme", ["rotary halves", "alibi", "t5 causal"])
def test_rows_of_a_padded_batch_stand_right_in_every_layer(scheme: str, sinks: int) -> None:
    """Issues: transformers#22161, x-transformers#292. Rows of a padded batch got wrong positions. What each layer, up
    to the last, holds of a row is what it holds of that row alone; padding on the left, on both sides, and between
    tokens."""
    layers = (Layer(2, sinks), Layer(None, groups=2), Layer(3, sinks, groups=1), Layer(None))
    stack, alone = make(layers, scheme), [make(layers, scheme) for _ in range(3)]
    masks = [torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool(), padding([(0, 1)] * 3, 1)]
    masks += [padding([(0, 1), (0, 0), (0, 1)], 1), padding([(3, 2), (0, 5), (2, 0)], 5), padding([(0, 1)] * 3, 1)]
    with torch.no_grad():
        for step, mask in enumerate(masks):
            x = tokens(3, mask.shape[1], 16, seed=step)
            stack(x, attention_mask=mask)
            for row, real in enumerate(mask):
                alone[row](x[row : row + 1, real])
                for block, own in zip(stack.blocks, alone[row].blocks, strict=True):
                    cache, expected = block.attention.kv_cache, own.attention.kv_cache
                    assert int(cache.lengths[row]) == expected.length
                    for name in ("key", "value"):
                        assert_same(cache[name][row, :, : expected.cached_length], expected[name][0])


def test_padding_pushes_no_token_out_of_any_layer() -> None:
    """Issues: mlx-lm#439 #735, unsloth#3699. Padding filled a sliding window. A row that has finished is padded for
    twenty steps: every layer, of whatever kind, still holds bit by bit what it held, and the row goes on from there."""
    stack, straight = make(LAYERS), make(LAYERS)
    with torch.no_grad():
        for one in (stack, straight):
            one(tokens(2, 7, 16))
        held = [numbers(cache[name][0]) for cache in caches(stack) for name in ("key", "value")]
        for step in range(20):
            x = tokens(2, 1, 16, seed=step)
            stack(x, attention_mask=torch.tensor([[False], [True]]))
        kept = [cache[name][0, :, : cached_lengths(cache)] for cache in caches(stack) for name in ("key", "value")]
        assert [numbers(tensor) for tensor in kept] == held
        x = tokens(2, 1, 16, seed=99)
        assert_same(stack(x)[:1], straight(x)[:1])


def caches(stack: BlockStack) -> list:
    return [block.attention.kv_cache for block in stack.blocks]


def cached_lengths(cache: object) -> int:
    return int(cache.cached_lengths[0])


def test_a_row_of_padding_alone_is_no_nan_higher_up() -> None:
    """Issues: pytorch#103749 #103963 #41508. A fully masked row was NaN, and the NaN travelled, as through the layers
    above. A row that joins late is finite before, and then is what it would have been from the start."""
    stack, alone = make(LAYERS), make(LAYERS)
    x = tokens(2, 6, 16).requires_grad_()
    out = run_chunks(stack, x, (3, 3), mask=padding([(0, 6), (0, 0)], 6))
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), [x, *stack.parameters()]):
        assert gradient.isfinite().all()
    with torch.no_grad():
        for step in range(4):
            x = tokens(2, 2, 16, seed=step)
            assert_same(stack(x)[1:], alone(x[1:]))


@pytest.mark.parametrize("step_by_step", [False, True])
def test_a_stack_with_caches_is_causal_without_being_told(step_by_step: bool) -> None:
    """Issues: torchtune `MultiHeadAttention`. With a cache and no mask given, attention was silently not causal. In any
    layer it would show: a later token of the second chunk changes nothing before it."""
    x = tokens(1, 8, 16)
    other = x.clone()
    other[:, 6] += 1.0
    with torch.no_grad():
        a, b = (
            run_chunks(make(LAYERS), sequence, (3, *((1,) * 5 if step_by_step else (5,)))) for sequence in (x, other)
        )
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.equal(a[:, 7], b[:, 7])


def watch(stack: BlockStack, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every distance that the one position scheme of all layers is asked about from now on."""
    (scheme,) = {block.attention.position for block in stack.blocks}
    asked, honest = [], scheme.bias_for
    monkeypatch.setattr(scheme, "bias_for", lambda distance, dtype: asked.append(distance) or honest(distance, dtype))
    return asked


@pytest.mark.parametrize("scheme", ["alibi", "t5 causal"])
def test_one_bias_for_all_layers_while_decoding(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issues: keras-hub#2862, candle#899, transformers#26144. While decoding the bias was that of a query at position
    0; or each layer computed it over its whole history. One object serves layers that hold 3, all and 2
    tokens: each asks about its own distances, to the keys that it can see, and the answers are those of an object of
    its own."""
    stack, apart = make(MIXED, scheme), make(MIXED, scheme, shared=False)
    apart.load_state_dict(stack.state_dict())
    asked = watch(stack, monkeypatch)
    with torch.no_grad():
        for step, length in enumerate((5, 1, 1, 1)):
            asked.clear()
            x = tokens(2, length, 16, seed=step)
            assert_same(stack(x), apart(x), atol=1e-12)
            if length == 1:
                seen = [sorted(distance.flatten().tolist()) for distance in asked]
                assert seen == [[0, 1, 2], [0, 1], list(range(5 + step))]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_recompute_is_refused_with_every_layer_as_it_was(reentrant: bool) -> None:
    """Issues: transformers#43010 #28056, flash-linear-attention#73. A checkpointed recompute appended the same tokens
    twice, here once in each layer. The lowest layer refuses, so all have read the same, and the next call works."""
    stack, straight = make(MIXED), make(MIXED)
    x = tokens(2, 3, 16).requires_grad_()
    out = checkpoint(stack, x, use_reentrant=reentrant)
    before = cache_snapshots(stack)
    with pytest.raises(CacheStateError, match=r"backward.*use_kv_cache"):
        out.sum().backward()
    assert cache_snapshots(stack) == before
    with torch.no_grad():
        straight(x)
        assert_same(stack(x), straight(x))
