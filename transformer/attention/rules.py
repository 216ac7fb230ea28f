"""Rules of the user's own, as functions of positions: which keys a query sees, and a change of its scores.

They are what `mask_mod` and `score_mod` of `torch.nn.attention.flex_attention` are, without batch and head. A rule is
told the true positions of tokens in their row, or document of a packed row, also of sinks and of tokens that `compress`
kept; a caller's `positions` do not change them.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cache import KeyValueView, Step
from ..errors import DtypeError, ShapeError
from ..kernels import as_bias
from ..masks import positions
from ..tracing import is_traced

MaskRule = Callable[[Tensor, Tensor], Tensor]
"""`rule(q_position, k_position) -> bool`, true: visible. See `Attention`."""

ScoreRule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`rule(scores, q_position, k_position) -> scores`. See `Attention`."""

MOST_SHARED = 1 << 22
"""Numbers of a mask that all layers of a call share (16 MiB). A larger one is formed in blocks, in each layer."""


class Rules(NamedTuple):
    """The rules of one module.

    Positions of queries come as int64 [1 or B, L], those of keys as [1 or B, S] or [B, H, S], below 0 for a slot
    without a token. A rule is given only positions of tokens, as [1 or B, 1, L, 1] and [1 or B, 1 or H, 1, S].
    """

    mask: MaskRule | None
    score: ScoreRule | None

    def bias(self, query_at: Tensor, key_at: Tensor, heads: int) -> Tensor | None:
        """0 where the rule shows `heads` query heads a key, else -inf: broadcasts to [B, H, L, S]; None without one."""
        if self.mask is None:
            return None
        query_at, key_at = _outer(query_at, key_at)
        mask: Any = self.mask(query_at, key_at)
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            raise DtypeError(f"mask_rule: expected it to give a bool tensor, true for a visible key, got {_kind(mask)}")
        shape = max(len(query_at), len(key_at)), heads, query_at.shape[2], key_at.shape[3]
        sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
        if not is_traced(mask) and (mask.ndim > 4 or any(own not in (1, whole) for own, whole in sizes)):
            raise ShapeError(
                f"mask_rule: expected it to give a tensor that broadcasts to [B, H, L, S] = {list(shape)}, got "
                f"{list(mask.shape)}; positions come as [1 or B, 1, L, 1] and [1 or B, 1 or H, 1, S]"
            )
        return as_bias(mask)

    def masked(self, bias: Tensor, query_at: Tensor, key_at: Tensor, heads: int) -> Tensor:
        """`bias`, -inf also where the rule hides a key."""
        ruled = self.bias(query_at, key_at, heads)
        return bias if ruled is None else bias + ruled

    def change(self, query_at: Tensor, key_at: Tensor) -> "AppliedScoreRule | None":
        """The change of scores between these positions; None without one."""
        return None if self.score is None else AppliedScoreRule(self.score, *_outer(query_at, key_at))


@dataclass(frozen=True, slots=True)
class AppliedScoreRule:
    """A rule of scores at the positions of one call, or of a block of it."""

    rule: ScoreRule
    query_at: Tensor
    key_at: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores [B, H, L, S], scaled and capped, as the rule changes them."""
        changed: Any = self.rule(scores, self.query_at, self.key_at)
        if not isinstance(changed, Tensor) or not changed.dtype.is_floating_point:
            raise DtypeError(f"score_rule: expected it to give a float tensor, got {_kind(changed)}")
        if not is_traced(scores) and changed.shape != scores.shape:
            raise ShapeError(
                f"score_rule: expected it to give [B, H, L, S] = {list(scores.shape)}, as it was given, got "
                f"{list(changed.shape)}"
            )
        rightly: Tensor = changed.to(scores.dtype)
        return rightly


class HasRules(nn.Module):
    """A module with rules of the user's own. They may be set at any time, for the calls from then on."""

    mask_rule: MaskRule | None
    score_rule: ScoreRule | None

    @property
    def rules(self) -> Rules | None:
        """Both rules; None without any."""
        mask, score = self.mask_rule, self.score_rule
        return None if mask is None and score is None else Rules(mask, score)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Of modules that were pickled before there was a choice.
        for name in {"mask_rule", "score_rule"} - self._modules.keys():
            self.__dict__.setdefault(name, None)


Ruled = tuple[Tensor | None, AppliedScoreRule | None]
"""A bias of 0 and -inf, and a change of scores; None where there is no such rule."""


class RulesOverView(NamedTuple):
    """The rules of a call between the queries of its step and the keys of its view."""

    rules: Rules
    step: Step
    view: KeyValueView
    heads: int

    @property
    def changes_scores(self) -> bool:
        """True if a rule changes scores, which then are formed in memory."""
        return self.rules.score is not None

    def between(self, begin: int, end: int, low: int, high: int) -> Ruled:
        """The bias and the change of scores of the queries [begin, end) and the columns [low, high) of the view."""
        query_at, key_at = self._query_positions()[:, begin:end], self._key_positions()[..., low:high]
        return self._ruled(query_at, key_at, (self._layout, begin, end, low, high))

    def to_sinks(self, begin: int, end: int) -> Ruled:
        """The same of the queries [begin, end) and the sinks of the view."""
        if self.view.sink_key is None:
            return None, None
        query_at, sink_at = self._query_positions()[:, begin:end], self.view.sink_positions()
        return self._ruled(query_at, sink_at, ("sinks", sink_at.shape[1], self.view.end, begin, end))

    def _ruled(self, query_at: Tensor, key_at: Tensor, block: Hashable) -> Ruled:
        """The same between these positions. Layers with one rule have one bias for an equal `block`."""
        mask, change = self.rules.mask, self.rules.change(query_at, key_at)
        numbers = max(len(query_at), len(key_at)) * self.step.width * self.view.key.shape[2]
        if mask is None or self.view.kept is not None or numbers > MOST_SHARED:
            return self.rules.bias(query_at, key_at, self.heads), change
        # The rule itself is kept beside its bias, so that no other one gets its id meanwhile.
        _, bias = self.step.once(
            ("mask rule", id(mask), self.heads, block),
            lambda: (mask, self.rules.bias(query_at, key_at, self.heads)),
        )
        return bias, change

    def _query_positions(self) -> Tensor:
        """int64 [1 or B, width]; padding has the position of the last token of its row."""
        return self.step.once("rules: query positions", self._make_query_positions)

    def _make_query_positions(self) -> Tensor:
        where, device = self.step.query_positions, self.view.key.device
        if not isinstance(where, Tensor):
            return positions(where, device).unsqueeze(0)
        last = (self.step.total_lengths - 1).column(device)
        return where if self.step.at is not None else torch.minimum(where, last)

    def _key_positions(self) -> Tensor:
        """int64 [1 or B, S], or [B, H, S] where each head has kept tokens of its own."""
        view = self.view
        if view.kept is not None:
            true = view.true_key_positions()
            return true.repeat_interleave(self.heads // true.shape[1], 1)
        return self.step.once(("key positions", self._layout), view.key_positions)

    @property
    def _layout(self) -> tuple[tuple[int, ...], ...]:
        return self.view.first, self.view.start, self.view.end


def _outer(query_at: Tensor, key_at: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys that broadcast against each other; 0 for a slot without a token."""
    query_at, key_at = query_at.clamp(min=0), key_at.clamp(min=0)
    return query_at[:, None, :, None], key_at[:, None, None, :] if key_at.ndim == 2 else key_at.unsqueeze(2)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
