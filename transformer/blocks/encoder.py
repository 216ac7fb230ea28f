"""Encoder block: self-attention and a feed-forward network."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..attention import Attention
from ..cache import Step
from ..initialization import reset_children
from ..signatures import typed_as
from .branches import attention_in, check_branches, step_of_block, without_padding
from .outputs import BlockOutput, keeping_weights
from .residual import Norm, Placement, Residual
from .signatures import encoder_block_call


class EncoderBlock(nn.Module):
    """Self-attention and a feed-forward network on one residual stream, each with its norms.

    Args:
        attention: one of the three attention modules, or a wrapper of one.
        feed_forward: a module from [B, L, E] to [B, L, E].
        norm: constructor of a norm over `E`, such as `RMSNorm` or `nn.LayerNorm`.
        placement: of the norms: "before" a branch, "after" the sum, on "both" sides of the branch, or on the output of
            the "branch" alone; see `Residual`.
        dropout: probability of dropout on the output of a branch, in training.
        residual_scale: factor of the output of a branch, before it is added to the stream.

    Raises ConfigurationError for branches of different widths or invalid options.
    """

    token_wise = True

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        norm: Norm,
        *,
        placement: Placement = "before",
        dropout: float = 0.0,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_branches(attention, feed_forward)
        width = attention_in("attention", attention).embed_dim
        # A wrapper is typed as the attention inside it, so that `block.attention.kv_cache` has a type.
        self.attention = cast("Attention", attention)
        self.feed_forward = feed_forward
        self.attention_residual = Residual(width, norm, placement, dropout, residual_scale)
        self.feed_forward_residual = Residual(width, norm, placement, dropout, residual_scale)

    @typed_as(encoder_block_call)
    def forward(
        self,
        x: Tensor,
        expanding_context: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        step: Step | None = None,
        return_weights: bool = False,
    ) -> Tensor | BlockOutput:
        """`x` [B, L, E] to [B, L, E]; the arguments are those of the attention's forward and raise the same.

        With `return_weights` the result is a `BlockOutput` with the attention weights.
        """
        # As in DecoderBlock.
        parts = self._modules
        attention = parts.get("attention")
        if attention is None:
            attention = self.attention
        feed_forward = parts.get("feed_forward")
        if feed_forward is None:
            feed_forward = self.feed_forward
        attention_residual = parts.get("attention_residual")
        if attention_residual is None:
            attention_residual = self.attention_residual
        feed_forward_residual = parts.get("feed_forward_residual")
        if feed_forward_residual is None:
            feed_forward_residual = self.feed_forward_residual
        if step is None or expanding_context is not None or attention_mask is not None:
            step = step_of_block(attention, x, expanding_context, attention_mask, step)
        kept: list[Tensor] = []
        attend: Callable[[Tensor], Tensor] = partial(attention, step=step)
        if step.real is not None and not step.flat:
            x = without_padding(x, step)
        x = attention_residual(x, keeping_weights(attend, kept) if return_weights else attend)
        # A partial instead of the module: accelerate's hooks move modules that are arguments of a call.
        out: Tensor = feed_forward_residual(x, partial(feed_forward))
        return BlockOutput(out, *kept) if return_weights else out

    def reset_parameters(self) -> None:
        """Initialises all parameters of the block."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
