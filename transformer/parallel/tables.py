"""Embeddings over ranks: a table that is whole on each rank, or cut over the vocabulary or over the heads."""

import torch.nn.functional as F
from torch import Tensor, nn

from .parts import local
from .ranks import Ranks


class LocalEmbedding(nn.Embedding):
    """An embedding whose table is whole on each rank, or of which this rank has some columns [n, E / ranks]."""

    token_wise = True

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` int64 [...] to the rows of this rank's table [..., columns]."""
        table = local(self._parameters["weight"])
        return F.embedding(ids, table, self.padding_idx)  # type: ignore[arg-type]


class VocabParallelEmbedding(nn.Embedding):
    """An embedding of which this rank has the rows of some tokens; each gives 0 for the others, and ranks are summed.

    The sum is exact. `Ranks.share` says which rows; a rank may have none of a small vocabulary.
    """

    token_wise = True
    ranks: Ranks

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` int64 [...], equal on all ranks, to [..., E]."""
        table = local(self._parameters["weight"])
        own = self.ranks.share(self.num_embeddings)
        if not own:
            # With the gradient of a table without rows.
            return self.ranks.summed(table.new_zeros(*ids.shape, self.embedding_dim) + table.sum())  # type: ignore[union-attr]
        places = ids - own.start
        elsewhere = (places < 0) | (places >= len(own))
        padding = self.padding_idx
        padding = None if padding is None or padding not in own else padding - own.start
        rows = F.embedding(places.masked_fill(elsewhere, 0), table, padding)  # type: ignore[arg-type]
        return self.ranks.summed(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0))
