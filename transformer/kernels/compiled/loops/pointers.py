"""Pointers in compiled kernels: arrays at addresses, the arguments of a launch, and its counter of chunks.

A kernel is one function of one argument, the address of its numbers: the counter first, then addresses and sizes. Each
thread that runs it takes the next chunk from the counter until none is left, so a thread that is late costs little.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LOOP: dict[str, Any] = {
    # What changes the meaning of NaN or infinity is left out: masks, padding and checks of logits rest on them.
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
    # A division by 0 gives infinity, and no Python error.
    "error_model": "numpy",
}
"""Options of numba for every loop and kernel."""

LINE = 64
"""Bytes of a line of the cache."""

NUMBERS = types.CPointer(types.int64)
"""The argument of a kernel."""

_INT = ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()


@intrinsic
def pointer_at(_context: Any, address: Any, kind: Any) -> Any:
    """The pointer to numbers of a type at an address: `carray(pointer_at(address, types.float32), size)`."""
    pointer = types.CPointer(kind.dtype)

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], context.get_value_type(pointer))

    return pointer(types.int64, kind), generate


@intrinsic
def next_chunk(_context: Any, numbers: Any) -> Any:
    """The number of the next chunk that no thread has taken: the counter is the first of a kernel's numbers."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        counter = builder.bitcast(given[0], _INT.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(_INT, 1), "monotonic")

    return types.int64(numbers), generate


@intrinsic
def _prefetch(_context: Any, address: Any) -> Any:
    """Asks for the line of the cache that an address is in; nothing is read, so it may be any address."""

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        small, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, small, small, small])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, into_the_second_cache, of_data = (ir.Constant(small, number) for number in (0, 2, 1))
        builder.call(function, [builder.inttoptr(given[0], pointer), to_read, into_the_second_cache, of_data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(**LOOP)
def prefetch(address: int, size: int) -> None:
    """Asks for so many bytes from an address on.

    They come into the second cache: the first one is full of what is being worked on.
    """
    for line in range(0, size, LINE):
        _prefetch(address + line)


@intrinsic
def depends_on(_context: Any, stamp: Any) -> Any:
    """Nothing at run time; a kernel that names the stamp of the sources is compiled anew when one of them changes."""

    def generate(context: Any, _builder: Any, _signature: Any, _given: Any) -> Any:
        return context.get_dummy_value()

    return types.void(stamp), generate


@intrinsic
def _on_stack(_context: Any, numbers: Any) -> Any:
    """The address of a copy of a tuple of numbers that lives as long as the calling function."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        place = cgutils.alloca_once(builder, ir.ArrayType(_INT, len(numbers)))
        builder.store(given[0], place)
        return builder.ptrtoint(place, _INT)

    return types.int64(numbers), generate


@intrinsic
def _run(_context: Any, pool: Any, kernel: Any, threads: Any, numbers: Any) -> Any:
    """Runs the kernel at an address: by the threads of the pool, or in this thread where the pool is 0."""

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        pool, kernel, threads, numbers = given
        body = builder.inttoptr(kernel, ir.FunctionType(ir.VoidType(), [_BYTES]).as_pointer())
        numbers = builder.inttoptr(numbers, _BYTES)
        small = ir.IntType(32)
        entry_type = ir.FunctionType(ir.VoidType(), [body.type, _BYTES, small, small])
        parallel = builder.icmp_signed("!=", pool, ir.Constant(_INT, 0))
        with builder.if_else(parallel) as (then, otherwise):
            with then:
                entry = builder.inttoptr(pool, entry_type.as_pointer())
                builder.call(entry, [body, numbers, builder.trunc(threads, small), ir.Constant(small, 0)])
            with otherwise:
                builder.call(body, [numbers])
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, whole, whole, whole), generate


def launch(pool: int, kernel: int, threads: int, numbers: tuple[int, ...]) -> None:
    """Runs a kernel over its numbers, the first of them 0, with some threads of a pool, or in this thread (1)."""
    _run(pool if threads > 1 else 0, kernel, threads, _on_stack(numbers))
