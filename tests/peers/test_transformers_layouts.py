"""Positions of the caller and packed documents beside transformers' Llama, with the same weights."""

from __future__ import annotations

import torch

from tests.models.variants import ids
from tests.peers.llama import VOCAB, llama
from transformer.attention import TokenLayout

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3], [4, 4, 4, 4, 4, 4, 7, 7, 7]])


@torch.no_grad()
def test_positions_and_packed_documents() -> None:
    """Theirs finds documents by positions that restart; ours by segments."""
    ours, theirs = llama()
    tokens, placed = ids(2, 9, VOCAB), torch.tensor([[0, 2, 4, 6, 8, 10, 12, 30, 31]] * 2)
    mask = torch.ones(2, 9, dtype=torch.int64)
    expected = theirs(tokens, attention_mask=mask, position_ids=placed).logits
    torch.testing.assert_close(ours(tokens, position_ids=placed), expected, rtol=0, atol=1e-5)
    ours.enable_cache()
    calls = [ours(tokens[:, part], position_ids=placed[:, part]) for part in (slice(0, 4), slice(4, 5), slice(5, 9))]
    torch.testing.assert_close(torch.cat(calls, 1), expected, rtol=0, atol=1e-5)
    ours.disable_cache()
    within = TokenLayout.positions_in_documents(SEGMENTS)
    same = TokenLayout.same_document(SEGMENTS) & torch.ones(9, 9, dtype=torch.bool).tril()
    masked = theirs(tokens, attention_mask=same.unsqueeze(1), position_ids=within).logits
    packed = ours(tokens, segment_ids=SEGMENTS)
    torch.testing.assert_close(packed, masked, rtol=0, atol=1e-5)
    for row in range(2):
        found = theirs(tokens[row : row + 1], position_ids=within[row : row + 1], use_cache=False).logits
        torch.testing.assert_close(packed[row : row + 1], found, rtol=0, atol=1e-5)
