"""Inputs of a model: one of several arguments, and vectors in place of ids."""

from torch import Tensor

from ..attention import real_tokens
from ..blocks import BlockStack
from ..cache import active_call, active_sequence
from ..errors import ArgumentError
from .tokens import check_vectors


def check_one(**given: object) -> None:
    """Raises ArgumentError, with the names, unless exactly one of these arguments is not None."""
    there = [name for name, value in given.items() if value is not None]
    if len(there) != 1:
        raise ArgumentError(f"{', '.join(given)}: expected exactly one of them, got {' and '.join(there) or 'none'}")


def check_reads_whole(name: str, stack: BlockStack) -> None:
    """Raises ArgumentError where the next call reads this rank's part of a sequence, whose tokens are not each other's
    next ones."""
    if active_call() is not None or stack.keeps_cache():
        return
    if active_sequence(stack.modules()) is not None:
        raise ArgumentError(
            f"{name}: expected none in a call of this rank's part of a shared sequence, whose next and last tokens "
            "other ranks have; shift targets, cut both by parts_of, and take the loss of the part's logits"
        )


def checked_vectors(name: str, vectors: Tensor | None, embed_dim: int, mask_name: str, mask: Tensor | None) -> Tensor:
    """The vectors [B, L, E]. Raises ArgumentError, ShapeError, DtypeError or DeviceError for others, or such a mask."""
    check_vectors(name, vectors, embed_dim)
    checked: Tensor = vectors  # type: ignore[assignment]  # no tensor is refused
    # Within a generation the mask is already checked.
    if active_call() is None:
        real_tokens(mask_name, mask, checked.shape[0], checked.shape[1], checked.device)
    return checked
