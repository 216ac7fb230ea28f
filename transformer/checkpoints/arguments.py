"""Arguments of loading and saving, checked before a file is read or made."""

import torch

from ..cache.validation import FLOATS
from ..errors import ArgumentError, DeviceError
from ..files import is_path


def check_dtype(dtype: object) -> None:
    """Raises ArgumentError unless it is None or one of `FLOATS`."""
    if dtype is not None and dtype not in FLOATS:
        raise ArgumentError(f"dtype: expected None or one of {FLOATS}, got {dtype}")


def check_path(name: str, path: object) -> None:
    """Raises ArgumentError, naming it, for what is no path of text."""
    if not is_path(path):
        raise ArgumentError(f"{name}: expected a path of a folder as text or a Path, got {type(path).__name__}")


def checked_device(device: torch.device | str | None) -> torch.device:
    """The device, by default PyTorch's. Raises ArgumentError for what names none, and for `meta`, which holds no
    numbers; DeviceError for one that this machine does not have."""
    try:
        where = torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"device: expected None or a device such as 'cpu' or 'cuda:0', got {device!r:.200}; {_first_line(error)}"
        ) from error
    if where.type == "meta":
        raise ArgumentError("device: expected one that holds numbers, got meta; empty_model gives a model without any")
    try:
        torch.empty(1, device=where)
    # Each backend says in its own way that it is not there: PyTorch's without CUDA by an AssertionError.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise DeviceError(
            f"device: expected one that this machine and this PyTorch have, got {where}; {_first_line(error)}"
        ) from error
    return where


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
