"""Stacks for tests: a few layers from plain data, with random numbers from a seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tests.conversations import cache_snapshot
from tests.oracle import Options
from tests.setups import SCHEMES, build, fill, position_of
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock, FeedForward, GatedFeedForward, LayerNorm, RMSNorm


@dataclass(frozen=True)
class Layer:
    """One layer of a stack: its window, how many key/value heads, whether it reads a source."""

    window: int | None = None
    sinks: int = 0
    groups: int = 4
    reads: bool = False


MIXED = (Layer(3, groups=2), Layer(2, groups=1), Layer(None, groups=4))
"""Two windows and one layer that sees everything; GQA, MQA and MHA."""

WITH_SINKS = (Layer(3, 2), Layer(None, groups=2), Layer(3, 2, groups=1))

READERS = (Layer(3, groups=2, reads=True), Layer(None, groups=1), Layer(2, 1, reads=True))
"""Decoder layers of which the first and the last have cross-attention."""


def options_of(layer: Layer, scheme: str = "none", cached: bool = True, causal: bool = True, **more: object) -> Options:
    """What the attention of a layer is built with, as the oracle knows it."""
    return Options(
        num_groups=layer.groups,
        causal=causal,
        cached=cached,
        window_size=layer.window,
        num_sinks=layer.sinks,
        scheme=SCHEMES[scheme],
        **more,
    )


def make(
    layers: Sequence[Layer] = MIXED,
    scheme: str = "rotary halves",
    *,
    placement: str = "before",
    residual: str = "sequential",
    cached: bool = True,
    causal: bool = True,
    shared: bool = True,
    dtype: torch.dtype = torch.float64,
    **more: object,
) -> BlockStack:
    """A stack of these layers with a last norm; the same arguments give the same weights.

    `shared`: one position object serves all layers. Causal stacks have decoder blocks and root mean square norms,
    others encoder blocks and layer norms. Feed-forward networks are plain and gated in turns.
    """
    norm = RMSNorm if causal else LayerNorm
    if placement == "both":
        norm = partial(norm, unit_offset=True)
    one, blocks = None, []
    for index, layer in enumerate(layers):
        options = options_of(layer, scheme, cached, causal, **more)
        one = one if shared and one is not None else position_of(options)
        kind = {1: "MQA", options.num_heads: "MHA"}.get(layer.groups, "GQA")
        attention = build(options, kind, position=one)
        feed = (FeedForward, GatedFeedForward)[index % 2](options.embed_dim, 6, "silu", bias=True)
        block = partial(DecoderBlock if causal else EncoderBlock, attention, feed, norm, placement=placement)
        if causal:
            block = partial(block, residual=residual)
        if layer.reads:
            plain = replace(options, causal=False, scheme=None, window_size=None, num_sinks=0, stored=(None, None))
            block = partial(block, cross_attention=build(plain, kind))
        blocks.append(block())
    stack = BlockStack(blocks, norm(blocks[0].attention.embed_dim))
    fill(stack, 1)
    return stack.to(dtype)


def run_chunks(
    stack: BlockStack, x: Tensor, lengths: Iterable[int], mode: bool | None = None, mask: Tensor | None = None, **more
) -> Tensor:
    """The outputs of calls with `lengths` tokens each, side by side."""
    outputs, start = [], 0
    for length in lengths:
        own = slice(start, start + length)
        real = None if mask is None else mask[:, own]
        outputs.append(stack(x[:, own], expanding_context=mode, attention_mask=real, **more))
        start += length
    assert start == x.shape[1], "the chunks are the sequence"
    return torch.cat(outputs, dim=1)


def cache_snapshots(stack: BlockStack) -> list[object]:
    """Snapshots of all caches of the layers, cross-attention included."""
    modules = [module for module in stack.modules() if hasattr(module, "kv_cache")]
    return [cache_snapshot(module) for module in modules]
