"""Oracle of a budget: after each call the tokens beyond it are dropped, by scores that plain loops form."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.oracle import Options, Rotary, Token, dot, softmax
from tests.oracle_operations import EditableConversation, first_value
from transformer.cache.policies import AccumulatedAttention, KeyNorm, LastQueries, Random, SinksAndNewest
from transformer.cache.policy import NOTHING, Needs


class BudgetedConversation(EditableConversation):
    """A conversation that holds at most `tokens` after each call, by the rules of the library's policies."""

    def __init__(self, module: nn.Module, options: Options, budget: tuple[int, object]) -> None:
        super().__init__(module, options)
        self.tokens, self.policy = budget
        self.weights: dict[tuple[int, int, int], float] = defaultdict(float)
        self.queries: list[list[tuple[int, list]]] = []

    @property
    def oldest(self) -> int:
        """What a policy has observed cannot be taken back."""
        return max(self.lengths, default=0) if Needs.of(self.policy) != NOTHING else super().oldest

    def forked(self) -> BudgetedConversation:
        other = super().forked()
        other.weights, other.queries = self.weights.copy(), [list(row) for row in self.queries]
        return other

    def selected(self, rows: Sequence[int]) -> BudgetedConversation:
        other = super().selected(rows)
        other.queries = [list(self.queries[row]) for row in rows]
        other.weights = defaultdict(float)
        for (b, g, k), weight in self.weights.items():
            other.weights.update({(place, g, k): weight for place, row in enumerate(rows) if row == b})
        return other

    def joined(self, second: BudgetedConversation) -> BudgetedConversation:
        other = super().joined(second)
        other.queries += [list(row) for row in second.queries]
        other.weights.update({(b + len(self.said), g, k): weight for (b, g, k), weight in second.weights.items()})
        return other

    def cleared(self) -> BudgetedConversation:
        other = super().cleared()
        other.weights, other.queries = defaultdict(float), []
        return other

    def call(
        self, x: Tensor, attention_mask: Tensor | None = None, expanding_context: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        options, batch = self.options, len(x)
        before = [[self.row(b, g) for g in range(options.num_groups)] for b in range(len(self.said))]
        lengths, held = self.lengths or [0] * batch, max(self.cached_lengths, default=0)
        self.queries = self.queries or [[] for _ in range(batch)]
        out, weights = super().call(x, attention_mask, expanding_context)
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask
        for b in range(batch):
            at = {i: lengths[b] + int(mask[b, :i].sum()) for i in range(x.shape[1]) if mask[b, i]}
            for i, q in at.items():
                self.queries[b].append((q, self.model.heads("q_proj", x[b, i].tolist(), "q_norm")))
            for h in range(options.num_heads):
                g = h * options.num_groups // options.num_heads
                old = {c: token.position for c, token in enumerate(before[b][g])} if before else {}
                for c, k in (old | {held + i: q for i, q in at.items()}).items():
                    self.weights[b, g, k] += float(weights[b, h, :, c].sum())
        for b in range(batch):
            if len(self.rows[b]) > self.tokens:
                self.drop(b)
        return out, weights

    def drop(self, b: int) -> None:
        """One row keeps its best tokens."""
        scores = [self.scores(b, g) for g in range(self.options.num_groups)]
        whole = self.compressed(self.tokens, lambda token, g: scores[g].get(token.position, 0.0))
        self.kept[b], self.starts[b], self.reaches[b] = whole.kept[b], whole.starts[b], whole.reaches[b]

    def scores(self, b: int, g: int) -> dict[int, float]:
        """By position, of the tokens that a head has."""
        by, row, newest = self.policy, self.row(b, g), len(self.said[b]) - 1
        if isinstance(by, LastQueries):
            return self.attended(by, b, g, row)
        if isinstance(by, AccumulatedAttention):
            return {
                t.position: math.inf if t.position > newest - by.newest else self.weights[b, g, t.position] for t in row
            }
        return {t.position: self.score(t, g) for t in row}

    def score(self, token: Token, g: int) -> float:
        by = self.policy
        if isinstance(by, KeyNorm):
            return -math.sqrt(dot(token.keys[g], token.keys[g]))
        if isinstance(by, SinksAndNewest):
            return math.inf if token.position < by.sinks else float(token.position)
        if isinstance(by, Random):
            positions = torch.full((1, g + 1, 1), token.position)
            return float(by(positions, positions, positions=positions)[0, g, 0])
        return first_value(token, g)

    def turned(self, query: list[float], q: int) -> list[float]:
        """A query as attention has it; what the module adds to scores a policy does not know."""
        return self.options.scheme.rotate(query, q) if isinstance(self.options.scheme, Rotary) else query

    def attended(self, by: LastQueries, b: int, g: int, row: list[Token]) -> dict[int, float]:
        heads = [h for h in range(self.options.num_heads) if h * self.options.num_groups // self.options.num_heads == g]
        votes = [0.0] * len(row)
        for q, queries in self.queries[b][-by.window :]:
            seen = [s for s, token in enumerate(row) if token.position <= q]
            for h in heads:
                at = [self.model.product(self.turned(queries[h], q), row[s].keys[g]) for s in seen]
                for s, share in zip(seen, softmax(at), strict=True):
                    votes[s] += share
        reach, newest = by.kernel_size // 2, len(self.said[b]) - 1
        pooled = [max(votes[max(0, s - reach) : s + reach + 1]) for s in range(len(row))]
        return {
            token.position: math.inf if token.position > newest - by.window else pooled[s]
            for s, token in enumerate(row)
        }
