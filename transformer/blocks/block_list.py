"""Typed list of the blocks of a stack."""

from typing import TYPE_CHECKING, overload

from torch import nn

from .decoder import DecoderBlock
from .encoder import EncoderBlock

if TYPE_CHECKING:
    from collections.abc import Iterator

Block = EncoderBlock | DecoderBlock


class BlockList(nn.ModuleList):
    """A `ModuleList` of which type checkers know that it holds blocks."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Block]: ...

        @overload
        def __getitem__(self, index: slice) -> "BlockList": ...

        @overload
        def __getitem__(self, index: int) -> Block: ...

        def __getitem__(self, index: int | slice) -> "Block | BlockList": ...
