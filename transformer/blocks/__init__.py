"""Blocks for models: norms, feed-forward networks, encoder and decoder blocks, and stacks of blocks."""

from .decoder import DecoderBlock
from .encoder import EncoderBlock
from .feed_forward import ACTIVATIONS, FeedForward, GatedFeedForward
from .from_torch import from_torch
from .layers import layer_kinds
from .load_balancing import load_balancing_loss, router_logits
from .mixture import MixtureOfExperts
from .norms import LayerNorm, RMSNorm
from .outputs import BlockOutput, StackOutput
from .residual import Residual
from .stack import BlockStack

__all__ = [
    "ACTIVATIONS",
    "BlockOutput",
    "BlockStack",
    "DecoderBlock",
    "EncoderBlock",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "MixtureOfExperts",
    "RMSNorm",
    "Residual",
    "StackOutput",
    "from_torch",
    "layer_kinds",
    "load_balancing_loss",
    "router_logits",
]
