"""The text that `language_model.py` learns from, and what plain counting makes of it."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor


def read_bytes(path: Path | None) -> tuple[Tensor, int]:
    """The bytes `[N]` of a file, or of the language reference that every Python carries, and where their last
    twentieth begins, which is held out."""
    # A topic may stand there under two names: once is enough, or the held-out part might have been learnt by heart.
    raw = path.read_bytes() if path else "\n\n".join(dict.fromkeys(topics.values())).encode()
    return torch.tensor(list(raw)), len(raw) * 19 // 20


def ngram_bits(text: Tensor, cut: int, order: int) -> float:
    """Bits per byte of `text[cut:]`, by how often each byte followed the `order` bytes before it in `text[:cut]`."""
    seen, asked = text[:cut].unfold(0, order + 1, 1), text[cut - order :].unfold(0, order + 1, 1)
    chance = torch.full((len(asked),), 1 / 256)
    for known in range(order + 1):
        # The last `known` bytes and the next one, as one number. Each longer context leans a little on the shorter
        # ones, so that what was never seen after it is not impossible.
        digits = 256 ** torch.arange(known, -1, -1)
        counts = torch.bincount(seen[:, order - known :] @ digits, minlength=256 ** (known + 1)).view(-1, 256)
        context, following = asked[:, order - known :] @ digits // 256, asked[:, -1]
        chance = (counts[context, following] + chance) / (counts.sum(1)[context] + 1)
    return -chance.log2().mean().item()
