"""Mixture of experts: a feed-forward network of several gated ones, of which a router chooses some for each token."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError, require_count, require_flag, require_number
from ..initialization import reset_children
from ..kernels import HALF_DTYPES, LinearWeight, multiply_together, project
from ..signatures import typed_as
from ..tracing import is_known, is_traced
from .feed_forward import Activation, named_activation

MAX_DENSE_TOKENS = 64
"""Tokens up to which all experts multiply all tokens on a device, which then need not tell the host who was chosen.
Reading the weights takes longer than these products. An estimate: no card was measured."""

COPIES = 3
"""Times that the weights of a chosen expert are read or written where they are gathered first."""


class ExpertLinear(nn.Module):
    """The linear layers of all experts in one tensor: `weight` [N, out, in] and `bias` [N, out] for N experts."""

    token_wise = True

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor, experts: Tensor | None = None) -> Tensor:
        """`x` [N, T, in] to [N, T, out], by each expert its own T rows; with `experts` [P] `x` is [P, T, in]."""
        weight = self.weight if experts is None else self.weight[experts]
        out = torch.bmm(x, weight.transpose(1, 2))
        if self.bias is None:
            return out
        return out + (self.bias if experts is None else self.bias[experts]).unsqueeze(1)

    def layers(self, experts: Sequence[int]) -> list[LinearWeight]:
        """The layers of these experts."""
        biases = [None] * len(experts) if self.bias is None else _parts(self.bias, experts)
        weights = _parts(self.weight, experts)
        return [LinearWeight(weight, None, None, bias) for weight, bias in zip(weights, biases, strict=True)]

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        experts, outputs, inputs = self.weight.shape
        return f"num_experts={experts}, in_features={inputs}, out_features={outputs}, bias={self.bias is not None}"

    def reset_parameters(self) -> None:
        """Initialises each layer as an `nn.Linear`."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


def _parts(stacked: Tensor, experts: Sequence[int]) -> list[Tensor]:
    """The parts of a tensor of all experts that belong to these."""
    if not torch.is_grad_enabled():
        return [stacked[expert] for expert in experts]
    # The gradient of an index is as large as all experts; that of all parts together is formed once.
    parts = stacked.unbind()
    return [parts[expert] for expert in experts]


class MixtureOfExperts(nn.Module):
    """Sparse mixture of `num_experts` gated networks of width `hidden_dim` (arXiv 1701.06538, 2401.04088).

    A token goes to the `experts_per_token` experts that the router, a linear layer, gives the highest probabilities,
    and gets the sum of their outputs, weighted by these. With `normalize_weights` the weights of a token sum to 1, as
    in Mixtral, which is also the softmax over the logits of the chosen experts alone. No token is dropped.

    A call over few tokens reads the weights of their experts alone. On the CPU tokens are grouped by expert. On other
    devices, and while traced, the choice stays on the device: there the weights of a few tokens' experts are gathered,
    and all experts multiply more tokens; more than `MAX_DENSE_TOKENS` on a device are grouped, after one look of the
    host at their numbers.

    `activation` and `dropout` are as in `GatedFeedForward`, `bias` is that of the router and of all experts. For the
    loss that balances experts see `load_balancing_loss`.

    Raises ConfigurationError as `GatedFeedForward` does, and for an `experts_per_token` above `num_experts`.
    """

    token_wise = True

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_experts: int,
        experts_per_token: int,
        activation: Activation = "silu",
        *,
        normalize_weights: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_count("embed_dim", embed_dim)
        require_count("hidden_dim", hidden_dim)
        require_count("num_experts", num_experts)
        require_count("experts_per_token", experts_per_token)
        require_number("dropout", dropout, least=0.0, below=1.0)
        require_flag("normalize_weights", normalize_weights)
        if experts_per_token > num_experts:
            raise ConfigurationError(
                f"experts_per_token: expected at most num_experts={num_experts}, got {experts_per_token}"
            )
        self.embed_dim, self.num_experts, self.experts_per_token = embed_dim, num_experts, experts_per_token
        self.activation = named_activation(activation)
        self.normalize_weights = normalize_weights
        self.dropout = dropout
        self.router = nn.Linear(embed_dim, num_experts, bias, device, dtype)
        self.gate_proj = ExpertLinear(num_experts, embed_dim, hidden_dim, bias, device, dtype)
        self.up_proj = ExpertLinear(num_experts, embed_dim, hidden_dim, bias, device, dtype)
        self.down_proj = ExpertLinear(num_experts, hidden_dim, embed_dim, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, L, E] to [B, L, E]."""
        logits, tokens = project(self.router, x).flatten(0, -2), x.flatten(0, -2)
        # In float32 at least, as the weights that are chosen depend on small differences.
        probabilities = logits.softmax(-1, torch.float32 if logits.dtype in HALF_DTYPES else None)
        weights, chosen = probabilities.topk(self.experts_per_token)
        if self.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        outs = self._outputs(tokens, chosen)
        return (outs * weights.unsqueeze(-1)).sum(1).to(outs.dtype).view_as(x)

    def _outputs(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """The outputs [T, k, E] of the chosen experts [T, k] for `tokens` [T, E]."""
        number, copied = tokens.shape[0], tokens.shape[0] * self.experts_per_token * COPIES
        few = copied < self.num_experts
        if is_traced(tokens):
            few = is_known(few)
        elif number and (tokens.is_cpu or number > MAX_DENSE_TOKENS):
            return self._grouped(tokens, chosen)
        return self._gathered(tokens, chosen) if few else self._dense(tokens, chosen)

    def _grouped(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """By expert: each multiplies its own tokens."""
        if tokens.shape[0] == 1:
            return torch.cat(self._by_experts(chosen[0].tolist(), [tokens] * self.experts_per_token)).unsqueeze(0)
        # A pair is a token with one of its experts.
        expert_of_pair = chosen.flatten()
        order = expert_of_pair.argsort(stable=True)
        counts = expert_of_pair.bincount(minlength=self.num_experts).tolist()
        experts = [expert for expert, count in enumerate(counts) if count]
        rows = tokens[order // self.experts_per_token].split_with_sizes([counts[expert] for expert in experts])
        outs = torch.cat(self._by_experts(experts, rows))
        return outs[order.argsort()].view(*chosen.shape, self.embed_dim)

    def _by_experts(self, experts: Sequence[int], rows: Sequence[Tensor]) -> list[Tensor]:
        """The output [T, E] of each expert for its own rows [T, E]."""
        layers = (each.layers(experts) for each in (self.gate_proj, self.up_proj, self.down_proj))
        outs = []
        for x, gate_proj, up_proj, down_proj in zip(rows, *layers, strict=True):
            gate, up = multiply_together((gate_proj, up_proj), x.unsqueeze(0))
            (out,) = multiply_together((down_proj,), self._hidden(gate, up))
            outs.append(out[0])
        return outs

    def _gathered(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """By pairs of a token and an expert, with a copy of the expert's weights for each."""
        experts = chosen.flatten()
        rows = tokens.repeat_interleave(self.experts_per_token, 0).unsqueeze(1)
        hidden = self._hidden(self.gate_proj(rows, experts), self.up_proj(rows, experts))
        outs: Tensor = self.down_proj(hidden, experts)
        return outs.view(*chosen.shape, self.embed_dim)

    def _dense(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """All experts for all tokens, of which the chosen ones are taken: others may be infinite."""
        rows = tokens.expand(self.num_experts, -1, -1)
        outs: Tensor = self.down_proj(self._hidden(self.gate_proj(rows), self.up_proj(rows)))
        return outs[chosen, torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(-1)]

    def _hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        hidden = self.activation(gate) * up
        return F.dropout(hidden, self.dropout) if self.dropout and self.training else hidden

    def reset_parameters(self) -> None:
        """Initialises the router, the experts, and an activation with parameters."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
