"""Position-wise feed-forward networks of a block, plain and gated."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError, require_count, require_number, shown
from ..initialization import reset_children
from ..kernels import project, project_together
from ..signatures import typed_as

Activation = str | Callable[[Tensor], Tensor]
"""A name in `ACTIVATIONS`, or an elementwise callable."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
"""ReLU; GELU, exact and approximated by tanh (arXiv 1606.08415); SiLU, also called swish."""


class FeedForward(nn.Module):
    """Feed-forward network `down(activation(up(x)))` of width `hidden_dim` (arXiv 1706.03762, section 3.3).

    `dropout` acts on the hidden layer in training. `down_proj` of a 16-bit module may be float32, which T5 needs in
    float16; the result is then float32.

    Raises ConfigurationError for widths below 1, an activation that is neither a known name nor callable, or a dropout
    outside [0, 1).
    """

    token_wise = True

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: Activation = "gelu",
        *,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_count("embed_dim", embed_dim)
        require_count("hidden_dim", hidden_dim)
        require_number("dropout", dropout, least=0.0, below=1.0)
        self.embed_dim = embed_dim
        self.activation = named_activation(activation)
        self.dropout = dropout
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias, device, dtype)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, L, E] to [B, L, E]."""
        # Read where they are registered, a fifth of the cost of asking the module; what stands in for one may not be.
        parts = self._modules
        up_proj = parts.get("up_proj")
        if up_proj is None:
            up_proj = self.up_proj
        hidden = self.activation(project(up_proj, x))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        down_proj = parts.get("down_proj")
        if down_proj is None:
            down_proj = self.down_proj
        return _project_down(down_proj, hidden)

    def reset_parameters(self) -> None:
        """Initialises the projections, and an activation with parameters."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


class GatedFeedForward(nn.Module):
    """Gated feed-forward network `down(activation(gate(x)) * up(x))` of width `hidden_dim` (arXiv 2002.05202).

    With "silu" it is the network of Llama (SwiGLU), with "gelu_tanh" that of Gemma (GeGLU). `dropout` and a float32
    `down_proj` are as in `FeedForward`. Raises ConfigurationError as `FeedForward` does.
    """

    token_wise = True

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: Activation = "silu",
        *,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_count("embed_dim", embed_dim)
        require_count("hidden_dim", hidden_dim)
        require_number("dropout", dropout, least=0.0, below=1.0)
        self.embed_dim = embed_dim
        self.activation = named_activation(activation)
        self.dropout = dropout
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, bias, device, dtype)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias, device, dtype)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, L, E] to [B, L, E]."""
        parts = self._modules
        gate_proj = parts.get("gate_proj")
        if gate_proj is None:
            gate_proj = self.gate_proj
        up_proj = parts.get("up_proj")
        if up_proj is None:
            up_proj = self.up_proj
        gate, up = project_together((gate_proj, up_proj), x)
        hidden = self.activation(gate) * up
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        down_proj = parts.get("down_proj")
        if down_proj is None:
            down_proj = self.down_proj
        return _project_down(down_proj, hidden)

    def reset_parameters(self) -> None:
        """Initialises the projections, and an activation with parameters."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


def named_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The activation of this name, or the callable itself. Raises ConfigurationError for an unknown name."""
    if callable(activation):
        return activation
    known = ACTIVATIONS.get(activation) if type(activation) is str else None
    if known is None:
        raise ConfigurationError(
            f"activation: expected one of {sorted(ACTIVATIONS)} or a callable, got {shown(activation)}"
        )
    return known


def _project_down(projection: nn.Module, hidden: Tensor) -> Tensor:
    """`projection(hidden)`; 16-bit `hidden` is cast to float32 if the weights are float32. Autocast casts both."""
    if hidden.dtype in (torch.float16, torch.bfloat16):
        # Else read by `getattr`, because a wrapper of the linear layer gives the weight of that layer.
        weight = projection._parameters.get("weight") if type(projection) is nn.Linear else None
        weight = getattr(projection, "weight", None) if weight is None else weight
        wide = isinstance(weight, Tensor) and weight.dtype is torch.float32
        if wide and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.float()
    return project(projection, hidden)
