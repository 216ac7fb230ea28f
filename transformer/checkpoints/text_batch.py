"""Several texts as one batch of ids: cut to a length, and padded."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError, shown


class Encode(Protocol):
    """`Tokenizer.encode`: a text to ids, with the special tokens around it if `begins`."""

    def __call__(self, text: str, *, begins: bool = True) -> list[int]: ...


def checked_texts(texts: Sequence[str]) -> Sequence[str]:
    """The texts. Raises ArgumentError for a single str, whose characters would be texts, and for anything else."""
    given: object = texts
    if isinstance(given, list | tuple) and all(isinstance(each, str) for each in given):
        return texts
    raise ArgumentError(f"texts: expected a list of str, got {shown(given)}")


def encoded(encode: Encode, text: str, max_length: int | None = None) -> list[int]:
    """The tokens of a text with the special tokens around it, at most `max_length`: the end of the text is cut off.

    Raises ArgumentError for a `max_length` that is no room for the special tokens.
    """
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ArgumentError(f"max_length: expected None or a whole number of at least 1, got {shown(max_length)}")
    whole = encode(text)
    if max_length is None or len(whole) <= max_length:
        return whole
    inner = encode(text, begins=False)
    special = len(whole) - len(inner)
    if special > max_length:
        raise ArgumentError(f"max_length: expected room for {special} special tokens around a text, got {max_length}")
    before = next((n for n in range(special + 1) if whole[n : n + len(inner)] == inner), 0)
    return whole[:before] + inner[: max_length - special] + whole[before + len(inner) :]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as int64 [B, L], 0 after the end of each, and their mask [B, L], true for real tokens."""
    longest = max(map(len, rows), default=0)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64).unsqueeze(1)
    return ids.view(len(rows), longest), torch.arange(longest) < lengths
