"""Residual connections of branches, with their norms and their dropout."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError, require_number, shown
from ..initialization import reset_children
from ..signatures import typed_as

Placement = Literal["before", "after", "both", "branch"]
"""Placement of the norms of a branch; see `Residual`."""

ResidualKind = Literal["sequential", "parallel", "parallel_one_norm"]
"""How attention and feed-forward network add to the stream: one after the other, or as `in_parallel` does."""

Norm = Callable[[int], nn.Module]
"""Constructor of a norm over a width: `RMSNorm`, `nn.LayerNorm`, `partial(RMSNorm, eps=1e-5)`."""


class Residual(nn.Module):
    """Residual connection: adds the output of a branch to the stream `x` [B, L, E], with norms by `placement`.

    - "before": `x + branch(norm(x))`, the pre-norm of GPT-2 and Llama (arXiv 2002.04745);
    - "after": `norm(x + branch(x))`, the post-norm of the original transformer and of BERT (arXiv 1706.03762);
    - "both": `x + norm(branch(norm(x)))`, on both sides of the branch, as in Gemma 2 (arXiv 2408.00118);
    - "branch": `x + norm(branch(x))`, on the output of the branch alone, as in OLMo 2 (arXiv 2501.00656).

    What is added to `x` is multiplied by `scale` (Granite's residual multiplier). In training, `dropout` acts on the
    output of the branch. Raises ConfigurationError for an unknown placement, a dropout outside [0, 1) or a scale that
    is not above 0.
    """

    token_wise = True

    # Also of modules that were pickled before there was a choice.
    scale = 1.0

    def __init__(
        self, embed_dim: int, norm: Norm, placement: Placement = "before", dropout: float = 0.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        if placement not in get_args(Placement):
            raise ConfigurationError(f"placement: expected one of {get_args(Placement)}, got {shown(placement)}")
        require_number("dropout", dropout, least=0.0, below=1.0)
        require_number("scale", scale, above=0.0)
        self.dropout = dropout
        self.scale = float(scale)
        self.norm_before = norm(embed_dim) if placement in ("before", "both") else None
        self.norm_branch = norm(embed_dim) if placement in ("both", "branch") else None
        self.norm_after = norm(embed_dim) if placement == "after" else None

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], onto: Tensor | None = None) -> Tensor:
        """`x` [B, L, E] plus the output of `branch`, a callable from [B, L, E] to [B, L, E].

        With `onto` [B, L, E], `x` is only what the branch reads, and its output is added to that.
        """
        # Read where they are registered, a fifth of the cost of asking the module; None is not registered.
        norms = self._modules
        norm_before = norms.get("norm_before")
        if norm_before is None:
            norm_before = self.norm_before
        norm_branch = norms.get("norm_branch")
        if norm_branch is None:
            norm_branch = self.norm_branch
        norm_after = norms.get("norm_after")
        if norm_after is None:
            norm_after = self.norm_after
        added = branch(x if norm_before is None else norm_before(x))
        if norm_branch is not None:
            added = norm_branch(added)
        if self.dropout and self.training:
            added = F.dropout(added, self.dropout)
        if self.scale != 1.0:
            added = added * self.scale
        x = (x if onto is None else onto) + added
        return x if norm_after is None else norm_after(x)

    def reset_parameters(self) -> None:
        """Initialises the norms."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


def check_residual(residual: object, placement: object) -> None:
    """Raises ConfigurationError for an unknown kind, and for a parallel one whose norms are not before the branches."""
    if not (isinstance(residual, str) and residual in get_args(ResidualKind)):
        raise ConfigurationError(f"residual: expected one of {get_args(ResidualKind)}, got {shown(residual)}")
    if residual != "sequential" and placement != "before":
        raise ConfigurationError(
            f'residual: expected "sequential" unless norms are "before" branches, got {residual!r} with {placement!r}'
        )


def in_parallel(
    x: Tensor,
    attention: Callable[[Tensor], Tensor],
    feed_forward: Callable[[Tensor], Tensor],
    first: Callable[..., Tensor],
    second: Callable[..., Tensor] | None,
) -> Tensor:
    """`x + attention(norm(x)) + feed_forward(norm'(x))`: both branches read the same stream (arXiv 2204.06745).

    Without a `second` residual connection they read one norm, and dropout acts on their sum, as in Falcon.
    """
    if second is None:
        return first(x, lambda normed: attention(normed) + feed_forward(normed))
    return second(x, feed_forward, first(x, attention))
