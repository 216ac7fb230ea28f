"""Flat run of the real tokens of a padded or packed batch: one row after the other, without padding between them."""

import torch
from torch import Tensor

from .lengths import Lengths, on_device


class FlatRun:
    """Where the real tokens of a batch [B, L] stand, in three layouts of the same tokens:

    - as *given*: [B, L, ...], padding at any place;
    - *flat*: [1, N, ...], the N real tokens of all rows, row by row;
    - *aligned*: [R, width, ...], each row's tokens at its front, 0 after them.

    Norms, projections and feed-forward networks work token by token, so they compute the N tokens alone. A cache and a
    mask need rows, which are aligned. A token's row is the one whose part of `lengths` it is in; its position is that
    of the step. There are as many rows as given ones, R = B, unless these pack several documents, each of which is a
    row here.
    """

    __slots__ = ("_order", "_slots", "columns", "given", "given_rows", "lengths", "slots_on_host", "width")

    def __init__(self, on_host: Tensor, lengths: Lengths, device: torch.device) -> None:
        """`on_host` bool [B, L], on the CPU: true for a real token; `lengths`: how many each of the R rows has."""
        self.given_rows, self.columns = on_host.shape
        self.lengths = lengths
        self.width = max(lengths, default=0)
        # A copy from pageable host memory does not wait for the work that is queued on the device.
        self.given = on_host.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        counts = on_device(lengths, None)
        # Of each row: its first slot less the tokens before it.
        shift = torch.arange(len(lengths), device="cpu") * self.width - (counts.cumsum(0) - counts)
        self.slots_on_host = shift.repeat_interleave(counts)
        self.slots_on_host += torch.arange(len(self.slots_on_host), device="cpu")
        """int64 [N]: the place of each token among those of all aligned rows, `row * width + column`."""
        self._slots: Tensor | None = None
        self._order: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """`x` [B, L, E] as given to the flat [1, N, E]."""
        return x.flatten(0, 1).index_select(0, self.given).unsqueeze(0)

    def put_back(self, x: Tensor) -> Tensor:
        """The flat `x` [1, N, E] as given, [B, L, E]: exactly 0 at padding."""
        return _placed(x[0], self.given, self.given_rows, self.columns)

    def aligned(self, x: Tensor) -> Tensor:
        """The flat `x` [1, N, ...] as rows [R, width, ...], exactly 0 after the last token of each."""
        if min(self.lengths) == self.width:
            return x.reshape(len(self.lengths), self.width, *x.shape[2:])
        return _placed(x[0], self.slots, len(self.lengths), self.width)

    def flat(self, x: Tensor) -> Tensor:
        """Rows `x` [R, width, ...] as the flat [1, N, ...]."""
        x = x.flatten(0, 1)
        return (x if min(self.lengths) == self.width else x.index_select(0, self.slots)).unsqueeze(0)

    def aligned_heads(self, heads: Tensor) -> Tensor:
        """The flat heads [1, H, N, D] as rows [R, H, width, D]."""
        return self.aligned(heads.transpose(1, 2)).transpose(1, 2)

    def flat_heads(self, heads: Tensor) -> Tensor:
        """Heads [R, H, width, D] of rows as flat ones [1, H, N, D]."""
        return self.flat(heads.transpose(1, 2)).transpose(1, 2)

    def given_queries(self, weights: Tensor) -> Tensor:
        """Attention weights [B, H, width, S] of aligned queries as [B, H, L, S]: exactly 0 at padding."""
        return self.put_back(self.flat(weights.transpose(1, 2))).transpose(1, 2)

    @property
    def slots(self) -> Tensor:
        """The same on the device."""
        if self._slots is None:
            self._slots = self.slots_on_host.to(self.given.device, non_blocking=True)
        return self._slots

    @property
    def order(self) -> Tensor:
        """int64 [B, width]: the given column of each aligned token, 0 after the last one of a row."""
        if self._order is None:
            self._order = self.aligned((self.given % self.columns).unsqueeze(0))
        return self._order


def _placed(tokens: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    """`tokens` [N, ...] at their places in zeros [rows, columns, ...]; keeps the graph."""
    zeros = tokens.new_zeros(rows * columns, *tokens.shape[1:])
    placed = zeros.index_copy(0, places, tokens) if torch.is_grad_enabled() else zeros.index_copy_(0, places, tokens)
    return placed.view(rows, columns, *tokens.shape[1:])
