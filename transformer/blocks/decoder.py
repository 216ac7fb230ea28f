"""The block of a decoder: self-attention, attention over a source where it has one, then a feed-forward network."""

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..attention import Attention
from ..cache import ReadsSource, Step
from ..initialization import reset_children
from ..signatures import typed_as
from .branches import attention_in, check_branches, check_source, planned, without_padding
from .residual import Norm, Placement, Residual


class DecoderBlock(nn.Module, ReadsSource):
    """Self-attention, optional cross-attention and a feed-forward network over one stream, each with its norms.

    Without `cross_attention` it is the block of a decoder-only model. Causal order and caches are the attention
    modules' own: build them with `apply_causal_mask=True`, and `use_kv_cache=True` to generate.

    Args:
        attention: any of the three attention modules, or a module around one.
        feed_forward: a module from [B, L, E] to [B, L, E].
        norm: makes a norm over `E`, such as `RMSNorm` or `nn.LayerNorm`.
        cross_attention: a second attention module, over the `source` that calls then give.
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
        cross_attention: nn.Module | None = None,
        placement: Placement = "before",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_branches(attention, feed_forward, cross_attention)
        width = attention_in("attention", attention).embed_dim
        # Typed as the attention that it is or wraps, so that `block.attention.kv_cache` has a type.
        self.attention = cast("Attention", attention)
        self.cross_attention = cast("Attention | None", cross_attention)
        self.feed_forward = feed_forward
        self.attention_residual = Residual(width, norm, placement, dropout)
        if cross_attention is not None:
            self.cross_attention_residual = Residual(width, norm, placement, dropout)
        self.feed_forward_residual = Residual(width, norm, placement, dropout)

    def readers(self) -> tuple[Attention, ...]:
        """Its cross-attention, where it has one, whatever wraps it."""
        return () if self.cross_attention is None else (attention_in("cross_attention", self.cross_attention),)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        expanding_context: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        step: Step | None = None,
    ) -> Tensor:
        """`x` [B, L, E] to [B, L, E], over `source` [B, S, kv_dim] where the block has cross-attention.

        The arguments are those of the attention's own forward (`source` is its `kv`), and raise the same; ArgumentError
        where a source is missing or has nobody to read it.
        """
        check_source(source, source_mask, (self.cross_attention is not None,))
        step = planned(self.attention, x, expanding_context, attention_mask, step)
        x = self.attention_residual(without_padding(x, step), partial(self.attention, step=step))
        if self.cross_attention is not None:
            read = partial(self.cross_attention, kv=source, attention_mask=step.real, kv_mask=source_mask)
            x = self.cross_attention_residual(x, read)
        # Not the module itself: accelerate's hooks move modules that are among a call's arguments.
        out: Tensor = self.feed_forward_residual(x, partial(self.feed_forward))
        return out

    def reset_parameters(self) -> None:
        """Initialises all its parts anew."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
