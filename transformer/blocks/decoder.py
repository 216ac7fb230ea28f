"""Decoder block: self-attention, optional cross-attention, and a feed-forward network."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..attention import Attention
from ..cache import ReadsSource, Step
from ..errors import ConfigurationError
from ..initialization import reset_children
from ..signatures import typed_as
from .branches import attention_in, check_branches, check_reads_whole_rows, check_source, step_of_block, without_padding
from .outputs import BlockOutput, keeping_weights
from .residual import Norm, Placement, Residual, ResidualKind, check_residual, in_parallel
from .signatures import decoder_block_call


class DecoderBlock(nn.Module, ReadsSource):
    """Self-attention, optional cross-attention and a feed-forward network on one residual stream, each with its norms.

    Without `cross_attention` it is the block of a decoder-only model. Causal order and caches belong to the attention
    modules: build them with `apply_causal_mask=True`, and with `use_kv_cache=True` for generation.

    Args:
        attention: one of the three attention modules, or a wrapper of one.
        feed_forward: a module from [B, L, E] to [B, L, E].
        norm: constructor of a norm over `E`, such as `RMSNorm` or `nn.LayerNorm`.
        cross_attention: a second attention module, which attends to the `source` of a call.
        placement: of the norms: "before" a branch, "after" the sum, on "both" sides of the branch, or on the output of
            the "branch" alone; see `Residual`.
        dropout: probability of dropout on the output of a branch, in training.
        residual: "sequential": the feed-forward network reads the sum of the stream and the attention's output;
            "parallel": both read the same stream, each through its own norm (GPT-NeoX, arXiv 2204.06745);
            "parallel_one_norm": both read it through one norm (Falcon, arXiv 2311.16867), and dropout acts on the sum
            of their outputs. The parallel ones need norms "before" branches, and no cross-attention.
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
        cross_attention: nn.Module | None = None,
        placement: Placement = "before",
        dropout: float = 0.0,
        residual: ResidualKind = "sequential",
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_branches(attention, feed_forward, cross_attention)
        check_residual(residual, placement)
        if residual != "sequential" and cross_attention is not None:
            raise ConfigurationError(f'residual: expected "sequential" with cross_attention, got {residual!r}')
        width = attention_in("attention", attention).embed_dim
        # A wrapper is typed as the attention inside it, so that `block.attention.kv_cache` has a type.
        self.attention = cast("Attention", attention)
        self.cross_attention = cast("Attention | None", cross_attention)
        self.feed_forward = feed_forward
        self.residual = residual
        self.attention_residual = Residual(width, norm, placement, dropout, residual_scale)
        if cross_attention is not None:
            self.cross_attention_residual = Residual(width, norm, placement, dropout, residual_scale)
        self.feed_forward_residual = (
            None if residual == "parallel_one_norm" else Residual(width, norm, placement, dropout, residual_scale)
        )

    def readers(self) -> tuple[Attention, ...]:
        """The cross-attention module, also from inside a wrapper; empty if there is none."""
        return () if self.cross_attention is None else (attention_in("cross_attention", self.cross_attention),)

    @typed_as(decoder_block_call)
    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        expanding_context: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        step: Step | None = None,
        return_weights: bool = False,
    ) -> Tensor | BlockOutput:
        """`x` [B, L, E] to [B, L, E]; a block with cross-attention also takes `source` [B, S, kv_dim].

        The arguments are those of the attention's forward (`source` is its `kv`) and raise the same. Raises
        ArgumentError if the source is missing, or is given to a block without cross-attention.
        With `return_weights` the result is a `BlockOutput` with the attention weights.
        """
        # Read where they are registered, a fifth of the cost of asking the module; what stands in for one may not be.
        parts = self._modules
        attention = parts.get("attention")
        if attention is None:
            attention = self.attention
        feed_forward = parts.get("feed_forward")
        if feed_forward is None:
            feed_forward = self.feed_forward
        cross_attention = parts.get("cross_attention")
        if cross_attention is None:
            cross_attention = self.cross_attention
        attention_residual = parts.get("attention_residual")
        if attention_residual is None:
            attention_residual = self.attention_residual
        feed_forward_residual = parts.get("feed_forward_residual")
        if feed_forward_residual is None:
            feed_forward_residual = self.feed_forward_residual
        if source is not None or source_mask is not None or cross_attention is not None:
            check_source(source, source_mask, (cross_attention is not None,))
        if step is None or expanding_context is not None or attention_mask is not None:
            step = step_of_block(attention, x, expanding_context, attention_mask, step)
        kept: list[Tensor] = []
        attend: Callable[[Tensor], Tensor] = partial(attention, step=step)
        if step.real is not None and not step.flat:
            x = without_padding(x, step)
        # A partial instead of the module: accelerate's hooks move modules that are arguments of a call.
        feed = partial(feed_forward)
        own = keeping_weights(attend, kept) if return_weights else attend
        if feed_forward_residual is None or self.residual == "parallel":
            out: Tensor = in_parallel(x, own, feed, attention_residual, feed_forward_residual)
            return BlockOutput(out, *kept) if return_weights else out
        x = attention_residual(x, own)
        if cross_attention is not None:
            check_reads_whole_rows(step)
            attend = partial(cross_attention, kv=source, kv_mask=source_mask)
            attend = partial(attend, step=step) if step.flat else partial(attend, attention_mask=step.real)
            x = self.cross_attention_residual(x, keeping_weights(attend, kept) if return_weights else attend)
        out = feed_forward_residual(x, feed)
        return BlockOutput(out, *kept) if return_weights else out

    def reset_parameters(self) -> None:
        """Initialises all parameters of the block."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
