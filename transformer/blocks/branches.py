"""Which branches go together in one block, and which source goes with them."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..attention import Attention
from ..cache import Step
from ..errors import ArgumentError, ConfigurationError
from .feed_forward import FeedForward, GatedFeedForward


def check_branches(attention: object, feed_forward: object, cross_attention: object = None) -> None:
    """Raises ConfigurationError where the branches of a block cannot share one stream."""
    attention = attention_in("attention", attention)
    if attention.kv_dim != attention.embed_dim:
        raise ConfigurationError(
            f"attention: expected kv_dim={attention.embed_dim}, as its embed_dim, since it reads the stream itself, "
            f"got {attention.kv_dim}; a source of another width is for cross_attention"
        )
    if not isinstance(feed_forward, nn.Module):
        raise ConfigurationError(f"feed_forward: expected a module, got {type(feed_forward).__name__}")
    if isinstance(feed_forward, FeedForward | GatedFeedForward) and feed_forward.embed_dim != attention.embed_dim:
        raise ConfigurationError(
            f"feed_forward: expected embed_dim={attention.embed_dim}, as attention, got {feed_forward.embed_dim}"
        )
    if cross_attention is None:
        return
    cross_attention = attention_in("cross_attention", cross_attention)
    if cross_attention is attention:
        raise ConfigurationError("cross_attention: expected a module of its own, got the one given as attention")
    if cross_attention.embed_dim != attention.embed_dim:
        raise ConfigurationError(
            f"cross_attention: expected embed_dim={attention.embed_dim}, as attention, "
            f"got {cross_attention.embed_dim}; the width of the source is its kv_dim"
        )
    if cross_attention.apply_causal_mask:
        raise ConfigurationError(
            "cross_attention: expected apply_causal_mask=False, as a source has no order, got True"
        )


def attention_in(name: str, module: object) -> Attention:
    """The attention of a branch, whatever wraps it. Raises ConfigurationError, naming it, where there is none."""
    if isinstance(module, Attention):
        return module
    parts = module.modules() if isinstance(module, nn.Module) else ()
    for part in parts:
        if isinstance(part, Attention):
            return part
    raise ConfigurationError(
        f"{name}: expected an attention module, or a module around one, got {type(module).__name__}"
    )


def planned(
    attention: nn.Module,
    x: Tensor,
    expanding_context: bool | None,
    attention_mask: Tensor | None,
    step: Step | None,
) -> Step:
    """The step of a block's call: the given one, or its own. Raises as the attention's `plan`, and where both come."""
    if step is None:
        return attention_in("attention", attention).plan(x, expanding_context, attention_mask)
    if expanding_context is not None or attention_mask is not None:
        raise ArgumentError("step: expected no expanding_context and no attention_mask beside it; it carries both")
    return step


def without_padding(x: Tensor, step: Step) -> Tensor:
    """`x` [B, L, E] with zeros at padding, so that nothing there reaches a norm or the gradient of a weight.

    A step that was made for other tokens is left for the attention to refuse.
    """
    if step.real is None or step.real.shape != x.shape[:2]:
        return x
    return x.masked_fill(~step.real.unsqueeze(-1), 0.0)


def check_source(source: Tensor | None, source_mask: Tensor | None, reads: Sequence[bool | None]) -> None:
    """Raises ArgumentError where a source is missing, or nobody asks for it.

    `reads`: for each block whether it reads one; None: it can take one.
    """
    if source is not None and not any(each is not False for each in reads):
        raise ArgumentError("source: expected None, as there is no cross_attention here, got a tensor")
    if source is None and any(reads):
        raise ArgumentError("source: expected [B, S, kv_dim] for the block's cross_attention, got None")
    if source is None and source_mask is not None:
        raise ArgumentError("source_mask: expected None without a source, got a tensor")
