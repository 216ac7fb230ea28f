"""Vectors in compiled kernels: LLVM code for registers of several float32 numbers, for which numba has no type.

A kernel sees addresses as int64. `Code` writes loads, shuffles, products, `exp` and `tanh` at the place of a builder,
and the intrinsics of attention are made of it. Only `contract` and, for sums, `reassoc` relax the arithmetic: NaN and
infinity keep their meaning.
"""

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from ...attention_layout import BFLOAT16, FLOAT8, FLOAT16, INT8

FEATURES = frozenset(str(cpu_target.target_context.codegen().magic_tuple()[2]).split(","))
"""What the processor that numba compiles for can do, such as `+avx512f`."""

LANES = 16 if "+avx512f" in FEATURES else 8
"""float32 numbers of a vector. LLVM divides one that is wider than the registers."""

DOT_PAIRS = LANES == 16 and "+avx512bf16" in FEATURES
"""Whether the processor sums products of bfloat16 numbers in float32, two at a time."""

BYTES = 4, 2, 2, 1, 1
"""Of one number of each kind but INT4."""

FLOAT8_UNIT = 256.0
"""What numbers of float8 are read as multiples of: it goes into their scale."""

ADDRESS = types.int64

AS_WRITTEN = {"error_model": "numpy", "fastmath": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of numba for functions with this code: with `fastmath`, which they would take over from the kernel that
calls them, LLVM takes the rounding of `exp` apart."""

FLOAT, INT, WHOLE = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(INT, LANES)

_SUM = ("reassoc", "contract", "nsz")
_FUSED = ("contract",)
_STORED = FLOAT, ir.IntType(16), ir.HalfType(), ir.IntType(8), ir.IntType(8)


class Code:
    """LLVM code at the place of a builder; addresses are int64 values, in bytes."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    # --- addresses and memory ---------------------------------------------------------------------------------------

    def at(self, address: Any, index: Any, size: int) -> Any:
        """The address of number `index` (a Python number or a value) of so many bytes each."""
        if isinstance(index, int):
            return self.builder.add(address, ir.Constant(WHOLE, index * size)) if index else address
        return self.builder.add(address, self.builder.mul(index, ir.Constant(WHOLE, size)))

    def load(self, address: Any, kind: Any = VECTOR, align: int = 4) -> Any:
        """What stands at an address, as a value of an LLVM type."""
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Any, address: Any, align: int = 4) -> None:
        """Writes a value to an address."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = align

    def load_stored(self, address: Any, dtype: int, count: int = LANES) -> Any:
        """So many numbers of a stored dtype as float32, exactly; those of float8 over `FLOAT8_UNIT`."""
        builder, size = self.builder, BYTES[dtype]
        stored = self.load(address, ir.VectorType(_STORED[dtype], count), size)
        floats, ints = ir.VectorType(FLOAT, count), ir.VectorType(INT, count)
        if dtype == BFLOAT16:
            shift = ir.Constant(ints, [16] * count)
            return builder.bitcast(builder.shl(builder.zext(stored, ints), shift), floats)
        if dtype == FLOAT16:
            return builder.fpext(stored, floats)
        if dtype == FLOAT8:
            return self._float8(stored)
        return builder.sitofp(stored, floats) if dtype == INT8 else stored

    def _float8(self, stored: Any) -> Any:
        """float8_e4m3fn over `FLOAT8_UNIT` as float32: float16 with the same bits, with another bias of exponents."""
        builder, count = self.builder, stored.type.count
        shorts = ir.VectorType(ir.IntType(16), count)

        def number(x: int) -> Any:
            return ir.Constant(shorts, [x] * count)

        bits = builder.and_(builder.shl(builder.sext(stored, shorts), number(7)), number(0xBFFF))
        nan = builder.icmp_signed("==", builder.and_(bits, number(0x3F80)), number(0x3F80))
        bits = builder.select(nan, number(0x7E00), bits)
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), count)), ir.VectorType(FLOAT, count))

    def store_rounded(self, value: Any, address: Any, dtype: int) -> None:
        """Writes float32 numbers, rounded to a float dtype, ties to even."""
        builder, count = self.builder, value.type.count
        if dtype == FLOAT16:
            value = builder.fptrunc(value, ir.VectorType(ir.HalfType(), count))
        elif dtype == BFLOAT16:
            ints = ir.VectorType(INT, count)

            def number(x: int) -> Any:
                return ir.Constant(ints, [x] * count)

            bits = builder.bitcast(value, ints)
            odd = builder.and_(builder.lshr(bits, number(16)), number(1))
            rounded = builder.add(bits, builder.add(odd, number(0x7FFF)))
            # Rounding could carry a NaN over into infinity.
            nan = builder.fcmp_unordered("uno", value, value)
            rounded = builder.select(nan, builder.or_(bits, number(0x400000)), rounded)
            value = builder.trunc(builder.lshr(rounded, number(16)), ir.VectorType(ir.IntType(16), count))
        self.store(value, address, BYTES[dtype])

    def repeated(self, value: Any) -> Any:
        """A shorter vector, repeated in all lanes."""
        count = value.type.count
        return value if count == LANES else self.shuffled(value, value, [lane % count for lane in range(LANES)])

    # --- arithmetic -------------------------------------------------------------------------------------------------

    def number(self, x: float) -> Any:
        """A number in all lanes."""
        return ir.Constant(VECTOR, [x] * LANES)

    def shuffled(self, first: Any, second: Any, lanes: list[int]) -> Any:
        """The lanes with these numbers of two vectors, those of the second after those of the first."""
        mask = ir.Constant(ir.VectorType(INT, len(lanes)), lanes)
        return self.builder.shuffle_vector(first, second, mask)

    def fused(self, x: Any, y: Any, z: Any, flags: tuple[str, ...] = _FUSED) -> Any:
        """`x * y + z`, in one instruction where there is one."""
        return self.builder.fadd(self.builder.fmul(x, y, flags=flags), z, flags=flags)

    def dot_pairs(self, total: Any, x: Any, y: Any) -> Any:
        """`total` plus the sums of products of neighbours among twice as many bfloat16 numbers; see `DOT_PAIRS`."""
        kind = ir.FunctionType(VECTOR, [VECTOR, INTS, INTS])
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [total, self.builder.bitcast(x, INTS), self.builder.bitcast(y, INTS)])

    def sum(self, x: Any, y: Any) -> Any:
        """`x + y`, in any order of a longer sum."""
        return self.builder.fadd(x, y, flags=_SUM)

    def maximum(self, x: Any, y: Any) -> Any:
        """The larger one in each lane; `y` where either is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def exp(self, x: Any) -> Any:
        """The exponential of numbers up to about 80, within 2 units in the last place; 0 below -87; NaN of NaN."""
        builder = self.builder
        # Adding 1.5 * 2 ** 23 rounds to a whole number, which then stands in the lowest bits.
        shifted = builder.fadd(builder.fmul(x, self.number(math.log2(math.e))), self.number(12582912.0))
        whole = builder.fsub(shifted, self.number(12582912.0))
        # The logarithm of 2 in two parts, the first of which has few enough bits for an exact product.
        rest = self.fused(whole, self.number(-0.693145751953125), x)
        rest = self.fused(whole, self.number(-1.428606765330187e-06), rest)
        result = self.number(1.0 / 5040)
        for divisor in (720, 120, 24, 6, 2):
            result = self.fused(result, rest, self.number(1.0 / divisor))
        result = self.fused(result, builder.fmul(rest, rest), builder.fadd(rest, self.number(1.0)))
        exponent = builder.shl(builder.bitcast(shifted, INTS), ir.Constant(INTS, [23] * LANES))
        result = builder.bitcast(builder.add(builder.bitcast(result, INTS), exponent), VECTOR)
        result = builder.select(builder.fcmp_ordered("<", x, self.number(-87.0)), self.number(0.0), result)
        # The exponent, added to the bits, makes a finite number of a NaN whose bits are all set, as a GPU gives it.
        return builder.select(builder.fcmp_unordered("uno", x, x), x, result)

    def tanh(self, x: Any) -> Any:
        """The hyperbolic tangent: by its series near 0, where the quotient of exponentials loses digits."""
        builder = self.builder
        negative = builder.fcmp_ordered("<", x, self.number(0.0))
        size = builder.select(negative, builder.fneg(x), x)
        power = self.exp(builder.fmul(size, self.number(-2.0)))
        one = self.number(1.0)
        far = builder.fdiv(builder.fsub(one, power), builder.fadd(one, power))
        square = builder.fmul(size, size)
        # The Taylor series up to the power of 13: below 0.3 its rest is under 1e-8 of the result.
        series = self.number(21844.0 / 6081075)
        for top, bottom in ((-1382, 155925), (62, 2835), (-17, 315), (2, 15), (-1, 3)):
            series = self.fused(series, square, self.number(top / bottom))
        near = self.fused(builder.fmul(series, square), size, size)
        result = builder.select(builder.fcmp_ordered("<", size, self.number(0.3)), near, far)
        return builder.select(negative, builder.fneg(result), result)


def counted(builder: Any, count: Any) -> Any:
    """A loop over `count` (a value): `with counted(builder, n) as index:`."""
    return cgutils.for_range(builder, count)


def _memory(kind: Any, numba_type: Any) -> tuple[Any, Any]:
    """Functions of kernels that read and write one number of a type at an address."""
    size = 8 if kind is WHOLE else 4

    @intrinsic
    def read(_context: Any, _address: Any, _index: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            code = Code(builder)
            return code.load(code.at(given[0], given[1], size), kind, size)

        return numba_type(ADDRESS, ADDRESS), generate

    @intrinsic
    def write(_context: Any, _address: Any, _index: Any, _value: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            code = Code(builder)
            code.store(given[2], code.at(given[0], given[1], size), size)
            return context.get_dummy_value()

        return types.void(ADDRESS, ADDRESS, numba_type), generate

    return read, write


read_whole, write_whole = _memory(WHOLE, types.int64)
read_float, write_float = _memory(FLOAT, types.float32)


@intrinsic
def float_of_bits(_context: Any, _word: Any) -> Any:
    """The float32 number in the lower half of a word."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.bitcast(builder.trunc(given[0], INT), FLOAT)

    return types.float32(types.int64), generate


@intrinsic
def add_shared(_context: Any, _address: Any, _number: Any) -> Any:
    """Adds to a number that several threads share; gives what it was. Writes before it are seen by the next thread."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        place = builder.inttoptr(given[0], WHOLE.as_pointer())
        return builder.atomic_rmw("add", place, given[1], "acq_rel")

    return types.int64(ADDRESS, types.int64), generate
