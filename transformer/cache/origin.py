"""Origin of a conversation, the model that made it: a reference while it lives, digests of its weights in a file."""

import hashlib
import struct
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError
from .files import Digests
from .holder import path_of

ROW = 4096
"""Words of 32 bits that become one sum; a row of multipliers fits into a core's cache."""

ROWS_AT_ONCE = 32
"""Rows that are widened at a time, into one buffer of 1 MiB: a new one for each takes three times as long."""

MOST_NAMED = 3
"""Differences that an error lists; the others it counts."""

Marks = list[tuple[int, int]]
"""Version and address of each weight: different after a change in place, a replacement or a move."""


class Origin(NamedTuple):
    """The model that a conversation is of, as far as it is known. A copy, or a pickle, has the digests alone.

    `marks` are those of its weights when the conversation left it; None as long as it is in the model.
    """

    model: "ref[nn.Module] | None" = None
    digests: Digests | None = None
    marks: Marks | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Origin":
        """The origin of a conversation that is in this model."""
        return cls(ref(model))

    def marked(self) -> "Origin":
        """The origin of a conversation that leaves the model now: it belongs to the weights that the model has now."""
        model = None if self.model is None else self.model()
        return self if model is None or self.marks is not None else self._replace(marks=_marks(model))

    def weights(self) -> Digests | None:
        """Digests of the weights of the living model, or those of a file; None where neither is there."""
        model = None if self.model is None else self.model()
        if model is None:
            return self.digests
        return None if self._changed(model) else digests(model)

    def _changed(self, model: nn.Module) -> bool:
        return self.marks is not None and self.marks != _marks(model)

    def check(self, model: nn.Module) -> None:
        """Raises ArgumentError, naming what differs, unless the weights of `model` are those that are known."""
        own = None if self.model is None else self.model()
        if own is not None and self._changed(own):
            raise ArgumentError(
                "check_weights: expected a conversation of weights that are still there, but those of its model "
                "changed, or were moved, since it was taken out or forked; feed its tokens to the model again, or "
                "install it without check_weights"
            )
        if own is model:
            return
        expected, found = self.weights(), digests(model)
        if expected is None or found is None:
            which = "conversation" if expected is None else "model"
            raise ArgumentError(
                f"check_weights: expected a conversation and a model whose weights are known, got a {which} with "
                "unknown weights (a file has digests of them where the model was alive when it was saved, unchanged "
                "since the conversation left it; sharded, packed and meta weights have none); feed its tokens to the "
                "model again, or install it without check_weights"
            )
        differing = [_difference(name, found, expected) for name in sorted({*found, *expected})]
        differing = [difference for difference in differing if difference]
        if differing:
            more = f"; and {len(differing) - MOST_NAMED} more" if len(differing) > MOST_NAMED else ""
            raise ArgumentError(
                "model: expected a model with the weights that made this cache; differences: "
                f"{'; '.join(differing[:MOST_NAMED])}{more}; load that model, in the same dtype"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, (None, self.digests)


def digests(model: nn.Module) -> Digests | None:
    """Digests of all parameters and buffers of a state dict; None where one of them has no numbers to be read.

    Equal for equal numbers on any device, in any wrapper, and other ones after a cast. A weight that is changed, or two
    that are exchanged, change them. They detect mistakes, not attacks.
    """
    found: Digests = {}
    digest = _Digest()
    for name, tensor in _tensors(model):
        if not _is_plain(tensor):
            return None
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[path_of(name)] = f"{dtype} {list(tensor.shape)} {digest(tensor.detach())}"
    return found


def _marks(model: nn.Module) -> Marks:
    """Marks of a change that need no look at the numbers. A change by `.data` in place leaves none of them."""
    # A tensor made in inference mode has no version, and a tensor that is not plain has no address.
    return [
        (-1 if tensor.is_inference() else tensor._version, tensor.data_ptr() if _is_plain(tensor) else 0)
        for _, tensor in _tensors(model)
    ]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; of a parameter that ranks share, this rank's part."""
    # Where it is not imported, nothing is shared; its import takes long.
    shared = sys.modules.get("torch.distributed.tensor")
    for name, parameter in model.named_parameters():
        yield name, parameter if shared is None or not isinstance(parameter, shared.DTensor) else parameter.to_local()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer


class _Digest:
    """Digest of the bytes of a tensor: SHA-256 of a sum over each row of words, times odd multipliers, which wraps.

    A word has 32 bits and a multiplier 64, so one changed word always changes its sum; words are widened and summed
    where the tensor is, and only the sums are read by the host.
    """

    def __init__(self) -> None:
        self._kept: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, tensor: Tensor) -> str:
        flat = tensor.contiguous().reshape(-1)
        # One number alone is contiguous with any stride, and is not viewed as bytes with each.
        data = flat.as_strided(flat.shape, (1,)).view(torch.uint8)
        if data.storage_offset() % 4:
            data = data.clone()
        # The last row is filled up with zeros, by itself, so that no weight is copied whole.
        whole = data.numel() // (4 * ROW) * (4 * ROW)
        parts = data[:whole], F.pad(data[whole:], (0, -data.numel() % (4 * ROW)))
        multipliers, wide = self._beside(tensor.device)
        sums = [
            wide[: len(words)].copy_(words).mul_(multipliers).sum(1)
            for part in parts
            for words in torch.split(part.view(torch.int32).view(-1, ROW), ROWS_AT_ONCE)
        ]
        numbers = torch.cat(sums).tolist()
        return hashlib.sha256(struct.pack(f"<{len(numbers)}q", *numbers)).hexdigest()[:32]

    def _beside(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The multipliers of a row, and room for the words of several."""
        if device not in self._kept:
            seed = hashlib.shake_128(b"weights").digest(8 * ROW)
            multipliers = [number | 1 for number in struct.unpack(f"<{ROW}q", seed)]
            self._kept[device] = (
                torch.tensor(multipliers, dtype=torch.int64, device=device),
                torch.empty(ROWS_AT_ONCE, ROW, dtype=torch.int64, device=device),
            )
        return self._kept[device]


def _difference(name: str, found: Digests, expected: Digests) -> str:
    """The difference of one tensor, in words; empty where both are the same."""
    if name not in found:
        return f"{name!r} is not in the model"
    if name not in expected:
        return f"{name!r} is not known to the conversation"
    there, here = (each[name].rpartition(" ") for each in (found, expected))
    if there[0] != here[0]:
        return f"{name!r} is {there[0]} there and {here[0]} here"
    return "" if there == here else f"{name!r} has other numbers"
