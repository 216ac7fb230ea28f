"""Inputs of a model: one of several arguments, and vectors in place of ids."""

from typing import NamedTuple

from torch import Tensor

from ..attention import TokenLayout, real_tokens
from ..blocks import BlockStack
from ..cache import active_call, active_sequence
from ..errors import ArgumentError
from .tokens import check_vectors


class TokensSaid(NamedTuple):
    """What a call says of its tokens, as `BlockStack.plan` takes it."""

    expanding_context: bool | None = None
    attention_mask: Tensor | None = None
    layout: TokenLayout | None = None


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


def layout_of(
    segment_ids: Tensor | None, prefix_lengths: Tensor | None, position_ids: Tensor | None
) -> TokenLayout | None:
    """The layout of a call's tokens; None where nothing is given. Raises ArgumentError for anything but tensors."""
    if segment_ids is None and prefix_lengths is None and position_ids is None:
        return None
    layout = TokenLayout(segment_ids, prefix_lengths, position_ids)
    for name, given in layout._asdict().items():
        if not isinstance(given, Tensor | None):
            raise ArgumentError(f"{name}: expected a tensor of whole numbers, got {type(given).__name__}")
    return layout


def named_mask(layout: TokenLayout | None, attention_mask: Tensor | None) -> tuple[str, Tensor | None]:
    """Name and value of the argument that says which tokens are real. Raises ArgumentError where two say it."""
    if layout is None or layout.segment_ids is None:
        return "attention_mask", attention_mask
    if attention_mask is not None:
        raise ArgumentError("attention_mask: expected None beside segment_ids, whose 0 is padding, got both")
    return "segment_ids", layout.segment_ids != 0


def checked_vectors(name: str, vectors: Tensor | None, embed_dim: int, mask_name: str, mask: Tensor | None) -> Tensor:
    """The vectors [B, L, E]. Raises ArgumentError, ShapeError, DtypeError or DeviceError for others, or such a mask."""
    check_vectors(name, vectors, embed_dim)
    checked: Tensor = vectors  # type: ignore[assignment]  # no tensor is refused
    # Within a generation the mask is already checked.
    if active_call() is None:
        real_tokens(mask_name, mask, checked.shape[0], checked.shape[1], checked.device)
    return checked
