"""Kernel that is compiled at its first use: on this machine once, and then read from numba's files.

numba keeps compiled code in `__pycache__` beside the sources, or in the user's cache directory where that is read-only.
A kernel that takes long to load, because it has to be compiled, says so in the log `transformer.kernels`.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from . import pool

logger = logging.getLogger("transformer.kernels")

SLOW_SECONDS = 1.0
"""Seconds of loading after which the log says what is going on."""

Run = Callable[[int, tuple[int, ...]], None]

_loading = threading.RLock()


class CompiledKernel:
    """One kernel over a tuple of numbers, the first of them 0: `kernel.run(threads, numbers)` runs it.

    Args:
        name: what the log calls it.
        build: gives numba's compiled callback; it imports what needs numba.
        lengths: of the tuples of numbers, for each of which a launch is compiled, too; others are at their first call.
    """

    run: Run
    """Runs in the calling thread (1), or in so many of PyTorch's: no Python function any more once it is loaded."""

    def __init__(self, name: str, build: Callable[[], Any], lengths: tuple[int, ...] = ()) -> None:
        self.name, self.lengths = name, lengths
        self._build = build
        self._callback: Any = None
        self.run = self._load_and_run

    def _load_and_run(self, threads: int, numbers: tuple[int, ...]) -> None:
        self.load()(threads, numbers)

    def load(self) -> Run:
        """Compiles the kernel, or reads what was compiled before; gives what `run` is from then on."""
        with _loading:
            if self._callback is not None:
                return self.run
            pool.find()
            with _told(self.name):
                callback = self._build()
                # Last: what another thread finds is complete.
                self.run = partial(launcher(*self.lengths), pool.entry(), callback.address)
            self._callback = callback
            return self.run


def built_by(file: str, function: str, *arguments: Any) -> Callable[[], Any]:
    """The call of a function of a file in `loops/`, which is imported then and not before: it brings numba along."""

    def build() -> Any:
        return getattr(import_module(f"{__package__}.loops.{file}"), function)(*arguments)

    return build


def launcher(*lengths: int) -> Any:
    """The function that runs a kernel, compiled for tuples of so many numbers."""
    from numba import types

    launch, whole = _launch(), types.int64
    for length in lengths:
        launch.compile((whole, whole, whole, types.UniTuple(whole, length)))
    return launch


@cache
def _launch() -> Any:
    from numba import njit

    from .loops.pointers import launch

    return kept_on_disk(partial(njit, nogil=True), launch)


@cache
def sources_stamp() -> int:
    """A number that changes with the sources of the kernels: numba itself compares only the file of each function."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "big")


def compiled_callback(function: Callable[[Any], None], name: str) -> Any:
    """A kernel `function(numbers)` as numba's callback."""
    from numba import cfunc, types

    from .loops.pointers import LOOP, NUMBERS

    function.__name__ = function.__qualname__ = name
    return kept_on_disk(partial(cfunc, types.void(NUMBERS), **LOOP), function)


def kept_on_disk(decorate: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """A function as one of numba's decorators compiles it: read from its files, if any can be written."""
    try:
        return decorate(cache=True)(function)
    except RuntimeError as error:
        # numba's words where neither the sources' folder nor the user's cache can be written.
        if "cannot cache" not in str(error):
            raise
        return decorate()(function)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Says which kernel is compiled, or read from disk, while it is, if that takes more than a moment."""
    message = (
        "loading the CPU kernel %s, which is compiled once on each machine; transformer.kernels.warm_up(model) does it "
        "beforehand"
    )
    timer = threading.Timer(SLOW_SECONDS, logger.warning, (message, name))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
