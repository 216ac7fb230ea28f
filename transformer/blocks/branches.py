"""Checks of the branches of a block and of their source, and the step of a block's call."""

import inspect
from collections.abc import Sequence

from torch import Tensor, nn

from ..attention import Attention
from ..cache import Step
from ..errors import ArgumentError, ConfigurationError
from .feed_forward import FeedForward, GatedFeedForward
from .mixture import MixtureOfExperts


def check_branches(attention: object, feed_forward: object, cross_attention: object = None) -> None:
    """Raises ConfigurationError if the branches of a block cannot share one residual stream."""
    attention = attention_in("attention", attention)
    if attention.kv_dim != attention.embed_dim:
        raise ConfigurationError(
            f"attention: expected kv_dim={attention.embed_dim}, as its embed_dim, because it is self-attention, "
            f"got {attention.kv_dim}; a source of another width is for cross_attention"
        )
    if not isinstance(feed_forward, nn.Module):
        raise ConfigurationError(f"feed_forward: expected a module, got {type(feed_forward).__name__}")
    known = FeedForward | GatedFeedForward | MixtureOfExperts
    if isinstance(feed_forward, known) and feed_forward.embed_dim != attention.embed_dim:
        raise ConfigurationError(
            f"feed_forward: expected embed_dim={attention.embed_dim}, as attention, got {feed_forward.embed_dim}"
        )
    if cross_attention is None:
        return
    cross_attention = attention_in("cross_attention", cross_attention)
    if cross_attention is attention:
        raise ConfigurationError("cross_attention: expected another module than attention, got the same module")
    if cross_attention.embed_dim != attention.embed_dim:
        raise ConfigurationError(
            f"cross_attention: expected embed_dim={attention.embed_dim}, as attention, "
            f"got {cross_attention.embed_dim}; the width of the source is its kv_dim"
        )
    if cross_attention.apply_causal_mask:
        raise ConfigurationError(
            "cross_attention: expected apply_causal_mask=False, as a source has no causal order, got True"
        )


def attention_in(name: str, module: object) -> Attention:
    """The attention module in `module`, which may be a wrapper. Raises ConfigurationError if there is none."""
    if isinstance(module, Attention):
        return module
    parts = module.modules() if isinstance(module, nn.Module) else ()
    for part in parts:
        if isinstance(part, Attention):
            return part
    raise ConfigurationError(
        f"{name}: expected an attention module, or a module around one, got {type(module).__name__}"
    )


def accepts(block: nn.Module, keyword: str) -> bool:
    """True if the forward of a block, or of a wrapper around it, accepts this keyword."""
    parameters = inspect.signature(block.forward).parameters
    return keyword in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def step_of_block(
    attention: nn.Module,
    x: Tensor,
    expanding_context: bool | None,
    attention_mask: Tensor | None,
    step: Step | None,
) -> Step:
    """The given step, or a new one if `step` is None.

    Raises what the attention's `plan` raises, and ArgumentError if a step is given together with a mode or a mask.
    """
    if step is None:
        return attention_in("attention", attention).plan(x, expanding_context, attention_mask)
    if expanding_context is not None or attention_mask is not None:
        raise ArgumentError(
            "step: expected expanding_context=None and attention_mask=None with a step, which contains both; leave "
            "them out"
        )
    return step


def without_padding(x: Tensor, step: Step) -> Tensor:
    """`x` [B, L, E] with zeros at padding, so that padding reaches no norm and no gradient of a weight.

    `x` is returned unchanged for a step of another shape, which the attention then refuses.
    """
    if step.real is None or step.real.shape != x.shape[:2]:
        return x
    return x.masked_fill(~step.real.unsqueeze(-1), 0.0)


def check_reads_whole_rows(step: Step) -> None:
    """Raises ArgumentError for rows of several documents in blocks that read a source: it belongs to whole rows."""
    if step.packed:
        raise ArgumentError("segment_ids: expected None in blocks that read a source, which belongs to whole rows")


def check_source(source: Tensor | None, source_mask: Tensor | None, reads: Sequence[bool | None]) -> None:
    """Raises ArgumentError if a source is missing, or is given although no block reads it.

    `reads`: for each block, True if it reads a source, False if not, None if it accepts one.
    """
    if source is not None and not any(each is not False for each in reads):
        raise ArgumentError("source: expected None, as there is no cross_attention here, got a tensor")
    if source is None and any(reads):
        raise ArgumentError("source: expected [B, S, kv_dim] for the block's cross_attention, got None")
    if source is None and source_mask is not None:
        raise ArgumentError("source_mask: expected None without a source, got a tensor")
