"""Text of the examples that learn from bytes, and a byte n-gram model to compare a trained model with."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor


def read_bytes(path: Path | None) -> tuple[Tensor, int]:
    """The bytes `[N]` of a file, or of the language reference that comes with Python, and the index from which on they
    are held out: the last twentieth."""
    # Some topics have two names. Each is used once, else the held-out part could be in the training part.
    raw = path.read_bytes() if path else "\n\n".join(dict.fromkeys(topics.values())).encode()
    return torch.tensor(list(raw)), len(raw) * 19 // 20


def random_rows(text: Tensor, count: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` rows of `length` bytes and the byte after them, `[count, length + 1]`, at random places of a text."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length + 1)]


def ngram_bits(text: Tensor, cut: int, order: int) -> float:
    """Bits per byte of `text[cut:]`, by how often each byte followed the `order` bytes before it in `text[:cut]`."""
    known, asked = text[:cut].unfold(0, order + 1, 1), text[cut - order :].unfold(0, order + 1, 1)
    chance = torch.full((len(asked),), 1 / 256)
    for length in range(order + 1):
        # The last `length` bytes and the next one, as one number. Each longer context is smoothed by the shorter ones,
        # so that a byte that never followed it has a chance too.
        digits = 256 ** torch.arange(length, -1, -1)
        counts = torch.bincount(known[:, order - length :] @ digits, minlength=256 ** (length + 1)).view(-1, 256)
        context, following = asked[:, order - length :] @ digits // 256, asked[:, -1]
        chance = (counts[context, following] + chance) / (counts.sum(1)[context] + 1)
    return -chance.log2().mean().item()
