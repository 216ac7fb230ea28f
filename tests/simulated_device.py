"""Device that computes on the CPU and counts what the host waits for, so that any machine can test it.

Its tensors say that they are on `lazy`, a device of PyTorch that computes nothing unless its backend is set up. As on
a card, an operation of tensors there and on the CPU is an error, and the host waits where it reads a number, copies
without `non_blocking=True`, or asks for a result whose shape depends on numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.multinomial.default,
    aten.repeat_interleave.Tensor,
}
"""Operations for whose result, or its shape, the host waits."""


class OnDevice(Tensor):
    """A tensor on the device, with its numbers in `numbers` on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, None)

    def tolist(self) -> Any:
        """As of any tensor, which PyTorch refuses for a subclass."""
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        """The memory of its numbers, as of any tensor."""
        return self.numbers.untyped_storage()

    def data_ptr(self) -> int:
        """The address of its numbers, as of any tensor."""
        return self.numbers.data_ptr()

    def __repr__(self) -> str:
        return f"OnDevice({self.numbers})"

    __str__ = __repr__


class Waits(TorchDispatchMode):
    """Counts what the host waits for: `names` of the operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.names)


class FromData(TorchFunctionMode):
    """Makes a tensor of Python's numbers on the CPU, and copies it to the device: that waits, as on a card."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and given.get("device") is not None:
            target = given.pop("device")
            return func(*args, **given, device="cpu").to(target)
        return func(*args, **given)


def _run(func: Any, args: Any, kwargs: dict[str, Any], names: list[str] | None) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = any(isinstance(tensor, OnDevice) for tensor in given)
    target = kwargs.get("device")
    there = here if target is None else torch.device(target).type == DEVICE.type
    if func is aten.copy_.default:
        waits = isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice) and not (len(args) > 2 and args[2])
    elif func in (aten._to_copy.default, aten.to.dtype_layout, aten.to.device):
        waits = here != there and not kwargs.get("non_blocking", False)
    else:
        waits = here and (func in READS or _indexed_by_mask(func, args))
        if here and any(type(tensor) is Tensor and tensor.ndim for tensor in given):
            raise RuntimeError(f"{func}: expected all tensors on one device, got some on {DEVICE} and some on the CPU")
    if waits and names is not None:
        names.append(str(func))
    numbers = tree_map(lambda leaf: leaf.numbers if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    if target is not None:
        numbers[1]["device"] = torch.device("cpu")
    result = func(*numbers[0], **numbers[1])
    if func._schema.is_mutable and here:
        out = kwargs.get("out", args[0] if args else None)
        if isinstance(result, Tensor) and isinstance(out, OnDevice) and result is out.numbers:
            return out
    return tree_map(lambda leaf: OnDevice(leaf) if there and isinstance(leaf, Tensor) else leaf, result)


def _indexed_by_mask(func: Any, args: Any) -> bool:
    """True for an index of bool or on the CPU: the one is counted first, the other copied."""
    if func not in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return False
    return any(index is not None and (index.dtype == torch.bool or type(index) is Tensor) for index in args[1])


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """The operations that the host waits for inside the block."""
    # Autocast does not know the device.
    with mock.patch.object(torch, "is_autocast_enabled", return_value=False), FromData(), Waits() as mode:
        yield mode.names


def on_device(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the device."""
    with torch.no_grad(), Waits():
        return module.to(DEVICE)
