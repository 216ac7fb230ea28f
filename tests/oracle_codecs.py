"""Oracle of stored keys and values: one vector at a time, in plain Python, from the written rules of each codec.

Every step is rounded to float32, as the codecs say, by the `struct` module.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

Vector = list[float]


def float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def float16(number: float) -> float:
    return struct.unpack("e", struct.pack("e", float32(number)))[0]


def bfloat16(number: float) -> float:
    """The upper half of the bits, rounded to the nearest, ties to even."""
    bits = struct.unpack("I", struct.pack("f", number))[0]
    lower, upper = bits & 0xFFFF, bits >> 16
    if lower > 0x8000 or (lower == 0x8000 and upper & 1):
        upper += 1
    return struct.unpack("f", struct.pack("I", upper << 16))[0]


def _float8(code: int) -> float:
    """The number of seven bits, four of them an exponent: 0x7f is no number."""
    exponent, mantissa = code >> 3, code & 7
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6


EIGHTS = [_float8(code) for code in range(0x7F)]


def float8(number: float) -> float:
    """The nearest of all numbers that there are, ties to the even code."""
    code = min(range(0x7F), key=lambda code: (abs(EIGHTS[code] - abs(number)), code & 1))
    return -EIGHTS[code] if number < 0 else EIGHTS[code]


def scaled(vector: Vector, most: float, rounded: Callable[[float], float]) -> Vector:
    vector = [float32(number) for number in vector]
    scale = float32(max(abs(number) for number in vector) / most)
    if scale == 0.0:
        return [0.0] * len(vector)
    codes = [rounded(min(max(float32(number / scale), -most), most)) for number in vector]
    return [float32(code * scale) for code in codes]


def int4(vector: Vector) -> Vector:
    """In groups of 32, each between its own least and largest number."""
    stored: Vector = []
    for first in range(0, len(vector), 32):
        group = [float32(number) for number in vector[first : first + 32]]
        least = bfloat16(min(group))
        step = bfloat16(float32(float32(max(group) - least) / 15))
        for number in group:
            distance = float32(number - least)
            code = min(max(round(float32(distance / step) if step else distance), 0), 15)
            stored.append(float32(least + float32(step * code)))
    return stored


STORED: dict[str, Callable[[Vector], Vector]] = {
    "float32": lambda vector: [float32(number) for number in vector],
    "float16": lambda vector: [float16(number) for number in vector],
    "bfloat16": lambda vector: [bfloat16(float32(number)) for number in vector],
    "float8_e4m3fn": lambda vector: scaled(vector, 448.0, float8),
    "int8": lambda vector: scaled(vector, 127.0, round),
    "int4": int4,
}
"""What comes out of a cache for each vector that went in, by the name of its codec."""
