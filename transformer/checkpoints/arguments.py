"""Checks of the arguments of loading and saving, before a file is read or written."""

import torch

from ..cache.snapshot import FLOATS
from ..errors import ArgumentError, DeviceError
from ..files import is_path


def check_dtype(dtype: object) -> None:
    """Raises ArgumentError unless `dtype` is None or one of `FLOATS`."""
    if dtype is not None and dtype not in FLOATS:
        raise ArgumentError(f"dtype: expected None or one of {FLOATS}, got {dtype}")


def check_path(name: str, path: object) -> None:
    """Raises ArgumentError, with the argument's name, unless `path` is a path as text."""
    if not is_path(path):
        raise ArgumentError(f"{name}: expected a path of a folder as text or a Path, got {type(path).__name__}")


def checked_device(device: torch.device | str | None) -> torch.device:
    """The device; default: PyTorch's default device.

    Raises ArgumentError for an invalid device and for `meta`, which has no values, and DeviceError for a device that
    this machine does not have.
    """
    try:
        where = torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"device: expected None or a device such as 'cpu' or 'cuda:0', got {device!r:.200}; {_first_line(error)}"
        ) from error
    if where.type == "meta":
        raise ArgumentError("device: expected a device with values, got meta; empty_model gives a model without values")
    try:
        torch.empty(1, device=where)
    # Each backend reports a missing device in another way: PyTorch without CUDA raises an AssertionError.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise DeviceError(
            f"device: expected a device of this machine that this PyTorch supports, got {where}; {_first_line(error)}"
        ) from error
    return where


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
