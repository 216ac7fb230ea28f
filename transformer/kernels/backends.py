"""Backends of attention by name, and the request for one of them: `with backend("reference"):`."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from ..errors import ArgumentError


class Backend(Enum):
    """Ways to compute attention, all with the same result up to rounding."""

    REFERENCE = "reference"
    """Plain operations; serves every call."""
    SDPA = "sdpa"
    """PyTorch's `scaled_dot_product_attention`."""
    MATMUL = "matmul"
    """Two matrix products and a softmax in at least float32, with soft caps, sinks and weights."""
    SPLIT_KV = "split_kv"
    """One token over keys in parts, merged: for key/value heads too few to keep every core busy."""
    PREFIX_MERGE = "prefix_merge"
    """A chunk that ends its keys: those before it, and itself in causal order, merged (16 bits: one shifted mask)."""

    COMPILED = "compiled"
    """Loops that numba compiles, for few tokens on the CPU: the extra `fast`."""
    FLASH = "flash"
    """PyTorch's flash attention on NVIDIA GPUs, in 16 bits: windows and padded rows without a mask."""


class Request(threading.local):
    """What this thread asks for.

    Not a context variable: a compiler cannot read one, but guards on this, and compiles anew for another request. The
    compiler of torch 2.11 guards on attributes of the instance only, not on defaults of the class.
    """

    def __init__(self) -> None:
        self.backend: Backend | None = None
        """The backend; None: the table chooses."""
        self.allows_compiled = True
        """Whether compiled kernels may run, also of projections, norms and rotation: unless another is asked for."""


request = Request()


@contextmanager
def backend(name: Backend | str | None) -> Iterator[None]:
    """Computes attention with one backend in a `with` block, in this thread; None: with the one that the table chooses.

    An explicit request never falls back: a call that the backend cannot serve raises ArgumentError, which says why.

    Raises ArgumentError for an unknown name.
    """
    try:
        asked = None if name is None else Backend(name)
    except ValueError:
        known = sorted(each.value for each in Backend)
        raise ArgumentError(f"backend: expected a Backend, None or one of {known}, got {name!r}") from None
    before = request.backend, request.allows_compiled
    request.backend, request.allows_compiled = asked, asked in (None, Backend.COMPILED)
    try:
        yield
    finally:
        request.backend, request.allows_compiled = before
