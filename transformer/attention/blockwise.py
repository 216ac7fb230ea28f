"""Walks over the queries of one call in blocks, each against the keys that its rule can show it.

With a window every block reads a slice of keys no wider than the window and itself, so time and memory grow linearly in
the length. Masks and biases of positions are one float bias per block, -inf where a key is not visible; blocks at
equal distances share theirs.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..cache import KeyValueView, Step
from ..kernels import Kernel, Sinks, as_bias, is_fully_masked, scores_dtype
from ..masks import Rule, all_visible, beyond_window, positions, visible, window_bounds
from ..positions import ScoreBias
from .bias_layout import added, cut
from .observation import summed
from .rules import RulesOverView

WINDOW_BLOCK = 64
"""Queries of a block under a window, since a block also reads keys that only some of it see; or a rule of scores."""

BLOCK = 256
"""Queries of a block where only a mask or a bias bounds what is formed at once."""


@dataclass(slots=True)
class BlockwiseAttention:
    """One call of self-attention: `query` [B, H, width, D] for the keys, and `sink_query` for the sinks."""

    kernel: Kernel
    step: Step
    view: KeyValueView
    query: Tensor
    sink_query: Tensor
    score_bias: ScoreBias | None = None
    rules: RulesOverView | None = None
    given: Tensor | None = None
    """The caller's float bias for the packed queries and the keys (sinks first): broadcasts to [B, H, width, n + S]."""
    sink_logits: Tensor | None = None
    dropout: float = 0.0
    _formed: dict[Hashable, Tensor | None] = field(default_factory=dict)

    def __call__(self, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Output [B, H, width, D], and weights [B, H, width, n + S] (sinks first) where asked for."""
        width, columns = self.query.shape[2], self.view.key.shape[2]
        if return_weights:
            return self._block(0, width, 0, columns, True)
        if self._plainly_causal():
            return self.kernel(self.query, self.view.key, self.view.value, causal=True, dropout=self.dropout)
        outputs = [self._block(*block, False)[0] for block in self._blocks()]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)), None

    def with_sums(self) -> tuple[Tensor, Tensor]:
        """Output [B, H, width, D], and the summed weights [B, G, n + S] of all queries."""
        key, outputs = self.view.key, []
        number = 0 if self.view.sink_key is None else self.view.sink_key.shape[2]
        sums = key.new_zeros(*key.shape[:2], number + key.shape[2], dtype=scores_dtype(self.query))
        for begin, end, low, high in self._blocks():
            out, weights = self._block(begin, end, low, high, True)
            outputs.append(out)
            if weights is not None:
                own = summed(weights, self.step, self.view, begin)
                sums[..., :number] += own[..., :number]
                sums[..., number + low : number + high] += own[..., number:]
        return torch.cat(outputs, 2), sums

    def _blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """Blocks of queries [begin, end), each with the columns [low, high) that it needs."""
        narrow = self.step.rule.window is not None or (self.rules is not None and self.rules.changes_scores)
        width, size = self.query.shape[2], WINDOW_BLOCK if narrow else BLOCK
        for begin, end in zip(range(0, width, size), (*range(size, width, size), width), strict=True):
            yield begin, end, *self._reached(begin, end)

    def _plainly_causal(self) -> bool:
        """Whether the kernel's own causal order is the whole rule, and the quicker way: queries that end the keys."""
        rule, key = self.step.rule, self.view.key
        if not rule.causal or self.sink_logits is not None or key.shape[2] > (rule.window or key.shape[2]):
            return False
        if not self._aligned or self.score_bias is not None or self.rules is not None or self.given is not None:
            return False
        whole = self.query.shape[2] == key.shape[2]
        return self.view.sink_key is None and (
            whole or (self.query.shape[2] > 1 and self.kernel.prefers_causal(self.query, key))
        )

    @property
    def _aligned(self) -> bool:
        """True if one mask serves all rows: each column has the same position in every row.

        Rows may end early: in causal order no token sees the padding after it, and outputs of padding are not used.
        """
        step, view = self.step, self.view
        if self._per_head or view.placed is not None or step.at is not None:
            return False
        if not step.past_lengths.uniform or len(view.start) > 1:
            return False
        return view.first == view.start and (step.rule.causal or (step.uniform and view.uniform))

    @property
    def _per_head(self) -> bool:
        """True if distances count, and each key/value head has kept tokens of its own."""
        return self.view.kept is not None and (self.step.rule.window is not None or self.score_bias is not None)

    def _reached(self, begin: int, end: int) -> tuple[int, int]:
        """The columns [low, high) that the rule can show to these queries, in any row; at least one."""
        columns = self.view.key.shape[2]
        if self.step.rule.window is None and end == self.query.shape[2]:
            return 0, columns
        low, high = columns - 1, 1
        past, firsts = self.step.past_lengths, self.view.first
        for before, first in zip(past.expand(len(firsts)), firsts.expand(len(past)), strict=True):
            lowest, end_of_reach = window_bounds(range(before + begin, before + end), self.step.rule)
            low = min(low, lowest - first)
            high = max(high, columns if end_of_reach is None else end_of_reach - first)
        return max(low, 0), min(high, columns)

    def _block(self, begin: int, end: int, low: int, high: int, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        query = _narrowed(self.query, begin, end)
        key, value = _narrowed(self.view.key, low, high), _narrowed(self.view.value, low, high)
        sink_key, sink_value = self.view.sink_key, self.view.sink_value
        bias, sink_bias = self._bias(begin, end, low, high), self._sink_bias(begin, end)
        change = sink_change = None
        if self.given is not None:
            number = 0 if sink_key is None else sink_key.shape[2]
            given = cut(self.given, -2, begin, end)
            bias = added(bias, cut(given, -1, number + low, number + high))
            sink_bias = added(sink_bias, cut(given, -1, 0, number)) if number else None
        if self.rules is not None:
            ruled, change = self.rules.between(begin, end, low, high)
            sink_ruled, sink_change = self.rules.to_sinks(begin, end)
            bias, sink_bias = added(bias, ruled), added(sink_bias, sink_ruled)
        hides = self.given is not None or self.rules is not None or min(self.step.new_lengths) < self.step.width
        fully_masked = None
        if bias is not None and hides and change is None:
            # A fully masked query gets finite scores first and an output of 0 then: its gradients stay finite. Where
            # scores are changed the kernel does so.
            fully_masked = is_fully_masked(bias, sink_bias)
            bias = bias.masked_fill(fully_masked, 0.0)
        sinks = None
        if sink_key is not None and sink_value is not None:
            sinks = Sinks(_narrowed(self.sink_query, begin, end), sink_key, sink_value, sink_bias, sink_change)
        kernel = partial(self.kernel, sink_logits=self.sink_logits, dropout=self.dropout)
        out, weights = kernel(query, key, value, bias, sinks=sinks, change=change, return_weights=return_weights)
        if fully_masked is not None:
            out = out.masked_fill(fully_masked, 0.0)
            weights = None if weights is None else weights.masked_fill(fully_masked, 0.0)
        return out, weights

    # --- the biases of a block, None where every score stays as it is -----------------------------------------------

    def _bias(self, begin: int, end: int, low: int, high: int) -> Tensor | None:
        """By the window alone, for the columns of the view; broadcasts to [B, H, block, high - low]."""
        rule = Rule(self.step.rule.causal, self.step.rule.window)
        if self._per_head:
            return self._bias_by_head(begin, end, low, high, rule)
        if not self._aligned:

            def make_ragged() -> Tensor | None:
                query = self._query_positions()[:, begin:end]
                key = self.step.once(("key positions", self._layout), self.view.key_positions)[:, low:high]
                mask, placed = visible(query, key, rule), self.view.placed
                if placed is not None:
                    query, key = placed.query[:, begin:end], placed.key[:, low:high]
                return self._scored(query.unsqueeze(-1) - key.unsqueeze(-2), mask)

            return self._kept(("ragged bias", self.query.dtype, self._layout, begin, end, low, high), make_ragged)
        past = self.step.past_lengths[0]
        run, keys = range(past + begin, past + end), self.view.key_run()[low:high]
        every = all_visible(run, keys, rule)
        if every and self.score_bias is None:
            return None

        # Only the distance between the two runs matters.
        shift = run[0] - keys[0]

        def make() -> Tensor | None:
            query = torch.arange(shift, shift + len(run), device=self.query.device)
            key = torch.arange(len(keys), device=self.query.device)
            return self._scored(query.unsqueeze(-1) - key, None if every else visible(query, key, rule))

        return self._kept(("bias", self.query.dtype, shift, len(run), len(keys)), make)

    def _bias_by_head(self, begin: int, end: int, low: int, high: int, rule: Rule) -> Tensor:
        """The same from the true positions of each key/value head."""
        query, keys = self._query_positions()[:, begin:end], self.view.true_key_positions()[:, :, low:high]
        per_group, biases = self.query.shape[1] // keys.shape[1], []
        for group, key in enumerate(keys.unbind(1)):
            bias = self._scored(query.unsqueeze(-1) - key.unsqueeze(-2), visible(query, key, rule))
            own = bias if bias.shape[1] == 1 else bias.narrow(1, group * per_group, per_group)
            biases.append(own.expand(-1, per_group, -1, -1))
        return torch.cat(biases, 1)

    def _kept(self, block: Hashable, make: Callable[[], Tensor | None]) -> Tensor | None:
        """The result of `make`, computed once for all blocks at equal distances, in every layer of the same scheme."""
        if self.query.shape[2] > BLOCK and (self.step.rule.window is None or not self._aligned):
            return make()  # each block has its own distances: keeping all would keep L x S numbers
        if self.score_bias is None or not self.score_bias.learned:
            return self.step.once((block, self.score_bias), make)
        if not torch.is_grad_enabled() and block not in self._formed:
            return self.step.once_in_call((block, self.score_bias), make)
        # Of this layer alone while gradients are recorded: a learned bias then has a graph.
        if block not in self._formed:
            self._formed[block] = make()
        return self._formed[block]

    def _sink_bias(self, begin: int, end: int) -> Tensor | None:
        """For the sinks, where the window does not show them: broadcasts to [B, H, end - begin, n]."""
        sink_key, rule = self.view.sink_key, self.step.rule
        if sink_key is None:
            return None
        number, start = sink_key.shape[2], self.view.start
        apart = rule.window is not None and start.uniform and self._aligned
        if apart and self.score_bias is None and self._all_sinks_apart(begin, number):
            return None
        query = self._query_positions()[:, begin:end]
        sink = self.step.once(("sink positions", number, self.view.end), self.view.sink_positions)
        visible_sinks = beyond_window(query, sink, start.column(query.device), rule)
        clamped = query if rule.max_sink_distance is None else query.clamp(max=rule.max_sink_distance)
        return self._scored(clamped.unsqueeze(-1) - sink.unsqueeze(-2), visible_sinks)

    def _all_sinks_apart(self, begin: int, number: int) -> bool:
        """Whether the windows of all queries from `begin` on no longer reach any sink."""
        window = self.step.rule.window or 0
        return self.step.past_lengths[0] + begin - window >= number - 1

    def _scored(self, distance: Tensor, mask: Tensor | None) -> Tensor:
        """Bias of the position scheme at distances [..., L, S], -inf where not visible; [L, S] or with B and H."""
        if self.score_bias is not None:
            bias = self.score_bias.bias_for(distance, scores_dtype(self.query))
            return bias if mask is None else bias.masked_fill(~mask.unsqueeze(-3), float("-inf"))
        if mask is None:
            return torch.zeros((), dtype=self.query.dtype, device=distance.device)
        return as_bias(mask if mask.ndim == 2 else mask.unsqueeze(-3))

    def _query_positions(self) -> Tensor:
        where = self.step.query_positions
        return where if isinstance(where, Tensor) else positions(where, self.query.device).unsqueeze(0)

    @property
    def _layout(self) -> tuple[tuple[int, ...], ...]:
        return self.view.first, self.view.start, self.view.end


def _narrowed(x: Tensor, begin: int, end: int) -> Tensor:
    """Entries of dimension 2 of a tensor [B, H, L, D]."""
    return x if end - begin == x.shape[2] else x.narrow(2, begin, end - begin)
