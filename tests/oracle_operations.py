"""Oracle of the operations on a conversation, on plain lists."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from tests.oracle import Conversation, Options


class EditableConversation(Conversation):
    """A conversation that can be truncated, rearranged and forked, and knows how far `truncate` must reach."""

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
        answer = super().call(x, attention_mask, expanding_context, attn_bias)
        new_lengths = [after - before for after, before in zip(self.lengths, lengths, strict=True)]
        window = self.window(expanding_context, [[True] * number for number in new_lengths])
        if max(new_lengths) == 0:
            self.reaches = self.reaches or lengths
        elif window is not None and max(new_lengths) > window:
            self.reaches = [length if start else 0 for start, length in zip(self.starts, self.lengths, strict=True)]
        else:
            self.reaches = [length if start else 0 for start, length in zip(starts, lengths, strict=True)]
        return answer

    def forked(self) -> EditableConversation:
        other = copy.copy(self)
        other.said, other.starts = [list(row) for row in self.said], list(self.starts)
        return other

    def truncated(self, length: int) -> EditableConversation:
        """Rows keep their first `length` tokens, and hold again the whole window that ends there."""
        other, window = self.forked(), self.options.window_size or self.inferred
        other.said = [row[:length] for row in self.said]
        if window is not None:
            ends = (max(0, len(row) - window) for row in other.said)
            other.starts = [min(pair) for pair in zip(self.starts, ends, strict=True)]
        return other

    def selected(self, rows: Sequence[int]) -> EditableConversation:
        other = self.forked()
        other.said = [list(self.said[row]) for row in rows]
        other.starts, other.reaches = [self.starts[row] for row in rows], [self.reaches[row] for row in rows]
        return other

    def cleared(self) -> EditableConversation:
        other = copy.copy(self)
        other.said, other.starts, other.reaches, other.inferred = [], [], [], None
        return other

    @staticmethod
    def joined(first: EditableConversation, second: EditableConversation) -> EditableConversation:
        other, more = first.forked(), second.forked()
        other.said, other.starts = other.said + more.said, other.starts + more.starts
        other.reaches, other.inferred = other.reaches + more.reaches, other.inferred or more.inferred
        return other
