"""Exceptions at chosen operations of a call, also in the middle of a write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

NAN = float("nan")
ERRORS: tuple[Callable[[str], BaseException], ...] = (
    RuntimeError,
    torch.OutOfMemoryError,
    MemoryError,
    KeyboardInterrupt,
)


class HookError(Exception):
    """Raised by `failing`."""


def fail(*_: Any) -> None:
    raise HookError


@contextmanager
def failing(part: nn.Module, register: str) -> Iterator[None]:
    """Lets a part of a model raise, by the hook that `register` names."""
    handle = getattr(part, register)(fail)
    try:
        yield
    finally:
        handle.remove()


class Injected(TorchDispatchMode):
    """Counts operations, and raises instead of operation `at` (from 0); never where `at` is None.

    An operation that would have written into a tensor tears it first: what it was to write becomes NaN, as of a write
    that failed half-way.
    """

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at = at
        self.count = 0
        self.torn = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.count == self.at:
            self.tear(func, args)
            # One in four is not even an `Exception`: a conversation must survive Ctrl-C too.
            raise ERRORS[self.count % len(ERRORS)](f"injected at operation {self.count}, {func}")
        self.count += 1
        return func(*args, **(kwargs or {}))

    def tear(self, func: Any, args: tuple[Any, ...]) -> None:
        writes = [
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        ]
        if not any(writes) or not isinstance(args[0], Tensor):
            return
        if not args[0].is_floating_point() and args[0].dtype is not torch.uint8:
            return
        # Of records every bit is set, also those of their scales, which then are NaN.
        garbage = 0xFF if args[0].dtype is torch.uint8 else NAN
        self.torn += 1
        if func is torch.ops.aten.index_put_.default:
            target, indices, values = args[:3]
            func(target, indices, torch.full_like(values, garbage))
        else:
            args[0].fill_(garbage)
