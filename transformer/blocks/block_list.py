"""Typed list of the blocks of a stack."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, overload

from torch import nn

from .decoder import DecoderBlock
from .encoder import EncoderBlock

Block = EncoderBlock | DecoderBlock


class BlockList(nn.ModuleList):
    """A `ModuleList` whose elements have the type `Block` for type checkers."""

    # The hints of the inherited constructor name a class that PyTorch imports for type checkers only.
    def __init__(self, blocks: Iterable[nn.Module] | None = None) -> None:
        super().__init__(blocks)

    def _get_abs_string_index(self, idx: int) -> str:
        """The name of the block at an index. The first block of a part of a stack may be called "4"."""
        place = int(super()._get_abs_string_index(idx))  # type: ignore[no-untyped-call]
        return list(self._modules)[place]

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Block]: ...

        @overload
        def __getitem__(self, index: slice) -> "BlockList": ...

        @overload
        def __getitem__(self, index: int) -> Block: ...

        def __getitem__(self, index: int | slice) -> "Block | BlockList": ...
