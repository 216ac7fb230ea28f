"""Layout of the tokens of a call: documents that share a row, prefixes that see themselves, positions of the caller."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import NO_TOKEN


class TokenLayout(NamedTuple):
    """What a caller says of the tokens of a call, beside which of them are real; None each where that is nothing.

    Packed documents let rows of a batch have no padding, and training on them equals training on the documents apart. A
    prefix LM (UniLM, arXiv 1905.03197; T5, arXiv 1910.10683) reads a prompt in both directions.
    """

    segment_ids: Tensor | None = None
    """int [B, L]: each run of equal numbers is a document, which sees no other and begins at position 0; 0: padding."""
    prefix_lengths: Tensor | None = None
    """int [B]: the first tokens of a row, padding not counted, that see each other in both directions."""
    position_ids: Tensor | None = None
    """int [B, L]: positions for the position scheme in place of the counted ones. Who sees whom stays decided by the
    places in the row: order, window, sinks, and rules of the user's own."""

    @staticmethod
    def begins(segment_ids: Tensor) -> Tensor:
        """bool [B, L]: true for the first token of each run of equal numbers, those of padding included."""
        # By a roll: a slice that is a token shorter would exclude a length from exported graphs.
        place = torch.arange(segment_ids.shape[1], device=segment_ids.device)
        return (segment_ids != segment_ids.roll(1, 1)) | (place == 0)

    @staticmethod
    def positions_in_documents(segment_ids: Tensor) -> Tensor:
        """int64 [B, L]: the position of each token in its document, `NO_TOKEN` at padding."""
        place = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand(segment_ids.shape)
        begin = place.where(TokenLayout.begins(segment_ids), 0)
        if place.numel():
            begin = begin.cummax(-1).values
        return (place - begin).masked_fill(segment_ids == 0, NO_TOKEN)

    @staticmethod
    def same_document(segment_ids: Tensor) -> Tensor:
        """bool [B, L, L]: true where two tokens are of one run."""
        run = TokenLayout.begins(segment_ids).long().cumsum(-1)
        return run.unsqueeze(-1) == run.unsqueeze(-2)
