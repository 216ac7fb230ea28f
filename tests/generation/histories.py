"""Histories for tests of processors: rows of different lengths, as generation pads them."""

from __future__ import annotations

import torch
from torch import Tensor

from transformer.generation import History

VOCAB = 6


def padded(prompts: list[list[int]], new: list[list[int]]) -> History:
    """Rows with as many new tokens each; the first token of a row stands at its padding."""
    longest = max(map(len, prompts))
    rows = [prompt[:1] * (longest - len(prompt)) + prompt + more for prompt, more in zip(prompts, new, strict=True)]
    lengths = [len(prompt) + len(more) for prompt, more in zip(prompts, new, strict=True)]
    return History(torch.tensor(rows), lengths, list(map(len, new)))


def drawn(seed: int, rows: int = 5, new: int = 9, vocabulary: int = VOCAB) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 1 to 6 tokens, and new tokens, of a small vocabulary: much of it repeats."""
    generator = torch.Generator().manual_seed(seed)

    def row(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    lengths = torch.randint(1, 7, (rows,), generator=generator).tolist()
    return [row(length) for length in lengths], [row(new) for _ in range(rows)]


def scores_of(seed: int, rows: int = 5, dtype: torch.dtype = torch.float64, vocabulary: int = VOCAB) -> Tensor:
    """Scores of which some are excluded already."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    scores[::2, seed % vocabulary] = -torch.inf
    return scores
