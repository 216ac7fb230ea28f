"""Oracle of the operations on a conversation, on plain lists."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

from tests.oracle import Conversation, Kept, Options, Token


class EditableConversation(Conversation):
    """A conversation that can be truncated, rearranged, compressed and forked, and knows how far `truncate` must
    reach."""

    def __init__(self, module: torch.nn.Module, options: Options) -> None:
        super().__init__(module, options)
        self.reaches: list[int] = []

    @property
    def oldest(self) -> int:
        """The shortest length that `truncate` must reach: tokens from before a call of at most a window stay stored,
        and whole windows of the tokens of that call."""
        return max((min(pair) for pair in zip(self.reaches, self.lengths, strict=True)), default=0)

    def call(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        expanding_context: bool | None = None,
        attn_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths, starts = self.lengths or [0] * len(x), list(self.starts) or [0] * len(x)
        kept = list(self.kept) or [None] * len(x)
        answer = super().call(x, attention_mask, expanding_context, attn_bias)
        new_lengths = [after - before for after, before in zip(self.lengths, lengths, strict=True)]
        window = self.window(expanding_context, [[True] * number for number in new_lengths])
        if max(new_lengths) == 0:
            self.reaches = self.reaches or lengths
        elif window is not None and max(new_lengths) > window:
            self.reaches = [reach(*row) for row in zip(self.kept, self.starts, self.lengths, strict=True)]
        else:
            self.reaches = [reach(*row) for row in zip(kept, starts, lengths, strict=True)]
        return answer

    def compressed(self, keep: int, score: Callable[[Token, int], float]) -> EditableConversation:
        """Each head of a row with more tokens keeps the sinks, and of the others those of the highest scores."""
        other, sinks = self.forked(), self.options.num_sinks
        for b, row in enumerate(self.rows):
            if len(row) > keep:
                chosen = [self.chosen(b, group, keep - sinks, score) for group in range(self.options.num_groups)]
                other.kept[b] = Kept(chosen, len(self.said[b]))
                other.starts[b], other.reaches[b] = other.kept[b].first, other.kept[b].end
        return other

    def chosen(self, b: int, group: int, number: int, score: Callable[[Token, int], float]) -> list[int]:
        """The positions of the highest scores in order, of equal ones the newest; sinks aside."""
        tokens = [token for token in self.row(b, group) if token.position >= self.options.num_sinks]
        best = sorted(tokens, key=lambda token: (score(token, group), token.position))
        return sorted(token.position for token in best[len(best) - number :])

    def forked(self) -> EditableConversation:
        other = copy.copy(self)
        other.said, other.starts, other.kept = [list(row) for row in self.said], list(self.starts), list(self.kept)
        other.reaches = list(self.reaches)
        return other

    def truncated(self, length: int) -> EditableConversation:
        """Rows keep their first `length` tokens, and hold again the whole window that ends there."""
        other, window = self.forked(), self.options.window_size or self.inferred
        other.said = [row[:length] for row in self.said]
        if window is not None:
            firsts = (0 if kept is None else kept.first for kept in self.kept)
            ends = (max(first, len(row) - window) for first, row in zip(firsts, other.said, strict=True))
            other.starts = [min(pair) for pair in zip(self.starts, ends, strict=True)]
        return other

    def selected(self, rows: Sequence[int]) -> EditableConversation:
        other = self.forked()
        other.said = [list(self.said[row]) for row in rows]
        other.starts, other.reaches = [self.starts[row] for row in rows], [self.reaches[row] for row in rows]
        other.kept = [self.kept[row] for row in rows]
        return other

    def cleared(self) -> EditableConversation:
        other = copy.copy(self)
        other.said, other.starts, other.kept, other.reaches, other.inferred = [], [], [], [], None
        return other

    def joined(self, second: EditableConversation) -> EditableConversation:
        """The rows of both."""
        other, more = self.forked(), second.forked()
        other.said, other.starts = other.said + more.said, other.starts + more.starts
        other.kept = other.kept + more.kept
        other.reaches, other.inferred = other.reaches + more.reaches, other.inferred or more.inferred
        return other


def reach(kept: Kept | None, start: int, length: int) -> int:
    """The shortest length that a row reaches which now has `length` tokens: of these and later ones all is stored."""
    if kept is not None and start <= kept.first:
        return kept.end
    return length if start else 0


def first_value(token: Token, group: int) -> float:
    """The score of a simple policy."""
    return token.values[group][0]
