"""Conversion of `torch.nn` transformer layers to blocks with equal outputs."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ..attention import from_torch as attention_from_torch
from ..attention.conversion.replacement import unhooked
from ..errors import ArgumentError
from .block_list import Block
from .decoder import DecoderBlock
from .encoder import EncoderBlock
from .feed_forward import FeedForward
from .residual import Placement
from .stack import BlockStack

TorchLayer = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
KNOWN = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder)


def from_torch(module: nn.Module, apply_causal_mask: bool = False, use_kv_cache: bool = False) -> Block | BlockStack:
    """A block with the outputs of a `torch.nn` layer, or a stack with the outputs of a `torch.nn` encoder or decoder.

    `nn.TransformerEncoderLayer` becomes an `EncoderBlock`, `nn.TransformerDecoderLayer` a `DecoderBlock` with
    cross-attention, `nn.TransformerEncoder` and `nn.TransformerDecoder` a `BlockStack`. The result shares no memory
    with `module` and is always batch first. `apply_causal_mask` makes the self-attention causal (in torch this is an
    argument of each call); `use_kv_cache` gives all attention modules a cache.

    Raises ArgumentError for another kind of module, and for a module that has no equal among the blocks.
    """
    make = partial(_block, apply_causal_mask=apply_causal_mask, use_kv_cache=use_kv_cache)
    if isinstance(module, TorchLayer):
        return make(module)
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        _check(module)
        return BlockStack(map(make, module.layers), copy.deepcopy(module.norm)).train(module.training)
    raise ArgumentError(
        "module: expected an encoder, a decoder or one of their layers of torch.nn, "
        f"got {type(module).__name__}; for nn.MultiheadAttention use transformer.attention.from_torch"
    )


def _check(layer: TorchLayer | nn.TransformerEncoder | nn.TransformerDecoder) -> None:
    """Raises ArgumentError for a subclass or a module with hooks, because the conversion would lose its additions."""
    if type(layer) not in KNOWN or not unhooked(layer):
        raise ArgumentError(
            f"module: expected {' or '.join(kind.__name__ for kind in KNOWN)} without hooks, got "
            f"{type(layer).__name__}, whose additions would be lost; convert first, then add them"
        )
    if isinstance(layer, TorchLayer):
        names = ("dropout1", "dropout2", "dropout3")
        shares = {getattr(layer, name).p for name in names if name in layer._modules}
        if len(shares) > 1:
            raise ArgumentError(f"module: expected the same dropout for all branches, got {sorted(shares)}")


def _block(layer: TorchLayer, apply_causal_mask: bool, use_kv_cache: bool) -> Block:
    _check(layer)
    attention = attention_from_torch(layer.self_attn, apply_causal_mask, use_kv_cache)
    feed_forward = _feed_forward(layer)
    placement: Placement = "before" if layer.norm_first else "after"
    dropout = layer.dropout1.p
    if not isinstance(layer, nn.TransformerDecoderLayer):
        norm = _copies([layer.norm1, layer.norm2])
        return EncoderBlock(attention, feed_forward, norm, placement=placement, dropout=dropout).train(layer.training)
    cross_attention = attention_from_torch(layer.multihead_attn, use_kv_cache=use_kv_cache)
    block = DecoderBlock(
        attention,
        feed_forward,
        _copies([layer.norm1, layer.norm2, layer.norm3]),
        cross_attention=cross_attention,
        placement=placement,
        dropout=dropout,
    )
    return block.train(layer.training)


def _feed_forward(layer: TorchLayer) -> FeedForward:
    up, down = layer.linear1, layer.linear2
    feed_forward = FeedForward(
        up.in_features,
        up.out_features,
        copy.deepcopy(layer.activation),
        bias=up.bias is not None,
        dropout=layer.dropout.p,
        device="meta",
    )
    feed_forward.up_proj, feed_forward.down_proj = copy.deepcopy(up), copy.deepcopy(down)
    return feed_forward


def _copies(norms: Sequence[nn.Module]) -> Callable[[int], nn.Module]:
    """A norm constructor that gives copies of torch's norms in turn; a block makes its norms in the same order."""
    remaining = iter(norms)
    return lambda _: copy.deepcopy(next(remaining))
