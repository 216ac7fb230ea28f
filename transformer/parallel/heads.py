"""Attention modules and feed-forward networks of which a rank has some of the heads, or of the hidden units.

Their classes are made of the module's own, so that names, checks and `isinstance` stay. What such a module reads is
copied to the ranks here, once for all projections of it: one sum of gradients each, as of outputs.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..attention import Attention
from ..attention.call import Arguments
from ..cache import CacheCall, CacheSpec
from ..errors import ShapeError
from ..generation.shared_by_ranks import SharedByRanks
from .ranks import Ranks


class SharedModule(nn.Module, SharedByRanks):
    """A module that several ranks share; `ranks` are those."""

    ranks: Ranks
    whole_class: ClassVar[type[nn.Module]]
    """The class of the module before it was shared."""

    def check_gives_logits(self) -> None:
        """Raises nothing: it gives none."""

    def check_equal(self, given: Mapping[str, str]) -> None:
        """Raises RanksError where ranks were given different things."""
        self.ranks.check_equal(given)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made when it is first used, and has no name to be found by.
        return _blank, (self.whole_class,), self.__getstate__()  # type: ignore[no-untyped-call]


class SharedFeedForward(SharedModule):
    """A feed-forward network of which this rank has some of the hidden units."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, L, E], equal on all ranks, to [B, L, E], equal on all ranks."""
        return super().forward(self.ranks.copied(x))  # type: ignore[no-any-return]


class SharedAttention(SharedModule, Attention):
    """Attention of which this rank has `num_heads` of the query heads and `num_groups` of the key/value heads."""

    def query(self, x: Tensor) -> Tensor:
        """`x` [B, L, E] to this rank's queries [B, H / ranks, L, D]."""
        return super().query(self.ranks.copied(x))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [B, L, kv_dim] to this rank's keys and values [B, G / ranks, L, D]."""
        return super().key_value(self.ranks.copied(x))

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [B, L, E] to this rank's queries, keys and values."""
        return super().query_key_value(self.ranks.copied(x))

    @property
    def cache_spec(self) -> CacheSpec:
        """The specification of this rank's cache, which says whose it is."""
        return replace(super().cache_spec, share=(self.ranks.rank, self.ranks.number))

    def extra_repr(self) -> str:
        """Options as `print` shows them: heads are this rank's."""
        return f"{super().extra_repr()}, {self.ranks}"

    def _attend(self, outer: CacheCall | None, x: Tensor, given: Arguments) -> Tensor | tuple[Tensor, Tensor]:
        if given.attn_bias is None and not given.return_weights:
            return super()._attend(outer, x, given)
        whole = self.num_heads * self.ranks.number
        attended = super()._attend(outer, x, given._replace(attn_bias=self._own_heads(given.attn_bias, whole)))
        if isinstance(attended, Tensor):
            return attended
        out, weights = attended
        return out, self.ranks.joined(weights, whole, 1)

    def _own_heads(self, bias: Tensor | None, whole: int) -> Tensor | None:
        """The bias of this rank's heads, of one that broadcasts to [B, H, L, S] with the heads of all ranks.

        Its gradients are summed over the ranks.
        """
        if not isinstance(bias, Tensor):
            return bias
        if bias.ndim < 3 or bias.shape[-3] == 1:
            return self.ranks.copied(bias)
        if bias.shape[-3] != whole:
            raise ShapeError(
                f"attn_bias: expected to broadcast to [B, H, L, S] with H = {whole}, the heads of all ranks, "
                f"got {list(bias.shape)}"
            )
        return self.ranks.copied(bias).narrow(-3, self.ranks.rank * self.num_heads, self.num_heads)


def shared_class(kind: type[nn.Module]) -> type[SharedModule]:
    """The class of an attention module or a feed-forward network of this class that ranks share."""
    if kind not in _classes:
        base = SharedAttention if issubclass(kind, Attention) else SharedFeedForward
        token_wise = kind.__dict__.get("token_wise", False)
        _classes[kind] = type(f"Shared{kind.__name__}", (base, kind), {"whole_class": kind, "token_wise": token_wise})
    return _classes[kind]


_classes: dict[type[nn.Module], type[SharedModule]] = {}


def _blank(whole_class: type[nn.Module]) -> nn.Module:
    shared = shared_class(whole_class)
    return shared.__new__(shared)
