"""The block of an encoder: self-attention, then a feed-forward network."""

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..attention import Attention
from ..cache import Step
from ..initialization import reset_children
from ..signatures import typed_as
from .branches import attention_in, check_branches, planned, without_padding
from .residual import Norm, Placement, Residual


class EncoderBlock(nn.Module):
    """Self-attention and a feed-forward network over one stream, each with its norms.

    Args:
        attention: any of the three attention modules, or a module around one.
        feed_forward: a module from [B, L, E] to [B, L, E].
        norm: makes a norm over `E`, such as `RMSNorm` or `nn.LayerNorm`.
        placement: "before" a branch, "after" the sum, or on "both" sides of the branch; see `Residual`.
        dropout: share of what a branch adds that is dropped while training.

    Raises ConfigurationError for branches of different widths or options that cannot work.
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        norm: Norm,
        *,
        placement: Placement = "before",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_branches(attention, feed_forward)
        width = attention_in("attention", attention).embed_dim
        # Typed as the attention that it is or wraps, so that `block.attention.kv_cache` has a type.
        self.attention = cast("Attention", attention)
        self.feed_forward = feed_forward
        self.attention_residual = Residual(width, norm, placement, dropout)
        self.feed_forward_residual = Residual(width, norm, placement, dropout)

    def forward(
        self,
        x: Tensor,
        expanding_context: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        step: Step | None = None,
    ) -> Tensor:
        """`x` [B, L, E] to [B, L, E]; the arguments are those of the attention's own forward, and raise the same."""
        step = planned(self.attention, x, expanding_context, attention_mask, step)
        x = self.attention_residual(without_padding(x, step), partial(self.attention, step=step))
        # Not the module itself: accelerate's hooks move modules that are among a call's arguments.
        out: Tensor = self.feed_forward_residual(x, partial(self.feed_forward))
        return out

    def reset_parameters(self) -> None:
        """Initialises all its parts anew."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
