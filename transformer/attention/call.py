"""Call of an attention module: its arguments once they are checked, and its result before anything is published."""

from typing import NamedTuple

from torch import Tensor

from ..cache import CacheContents, CachedLayer, Generation, Step, TokenLayout
from .heads import CachedHeads
from .rules import Rules


class Arguments(NamedTuple):
    """The arguments of one call of `forward`, after `x`."""

    kv: Tensor | None
    expanding_context: bool | None
    attention_mask: Tensor | None
    kv_mask: Tensor | None
    attn_bias: Tensor | None
    return_weights: bool
    step: Step | None
    layout: TokenLayout | None = None


class AttentionCall(NamedTuple):
    """One call, checked. `step` is given in self-attention, `kv` in cross-attention; the other is None."""

    heads: CachedHeads
    x: Tensor
    """[B, L, E]."""
    layer: CachedLayer | None = None
    """The module's cache in this call; None where the call keeps nothing."""
    attn_bias: Tensor | None = None
    """float or bool, broadcasts to [B, H, L, S]."""
    dropout: float = 0.0
    return_weights: bool = False
    step: Step | None = None
    kv: Tensor | None = None
    """[B, S, kv_dim]."""
    real: Tensor | None = None
    """bool [B, L], true for the real tokens of `x`, in cross-attention; None where all are."""
    kv_real: Tensor | None = None
    """bool [B, S], the same for `kv`."""
    last_queries: int = 0
    """How many of the last queries of each row the cache keeps for the policy of its budget."""
    sums_weights: bool = False
    """Whether the cache keeps the sum of the attention weights for the policy of its budget."""
    rules: Rules | None = None
    """The module's rules of visibility and of scores, in self-attention; None where it has none."""
    sink_logits: Tensor | None = None
    """[H], a logit of each head that takes a share of the attention; None where the module has none."""
    generation: Generation | None = None
    """The running generation, in which weights are taken to stay as they are; None outside of one."""


class Attended(NamedTuple):
    """The result of a call: the output [B, L, E], and the contents of the module's cache after it."""

    out: Tensor
    weights: Tensor | None = None
    """[B, H, L, S], where they were asked for."""
    contents: CacheContents | None = None
    """None: as before."""


class SharedHeads(NamedTuple):
    """Queries [B, H, L, D], keys and values [B, G, L, D] of the tokens of one call, rotated; see `attend_over_view`."""

    query: Tensor
    key: Tensor
    value: Tensor
    unrotated: Tensor | None
