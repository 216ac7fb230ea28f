"""Codecs against plain loops over single numbers, and what holds for every one of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conversations import numbers
from tests.oracle_codecs import STORED
from transformer.codecs import CODECS, Codec, Coding, codec_names
from transformer.errors import ArgumentError

WIDTHS = (1, 5, 8, 32, 48, 64, 80)
EVERY = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def vectors(width: int) -> Tensor:
    """[2, 3, 40, width] of several sizes, with vectors of zeros, of equal numbers and of one large channel."""
    drawn = torch.randn(2, 3, 40, width, generator=torch.Generator().manual_seed(width))
    drawn *= torch.logspace(-30, 4, 40).unsqueeze(-1)
    drawn[0, 0, 1], drawn[0, 0, 2] = 0.0, 1.5
    drawn[0, 1, :, 0] = 900.0
    return drawn


def stored(codec: Codec, given: Tensor) -> Tensor:
    return codec.decode(codec.encode(given), given.shape[-1], given.dtype)


@EVERY
@pytest.mark.parametrize("width", WIDTHS)
def test_the_numbers_are_those_of_plain_loops(codec: Codec, width: int) -> None:
    given = vectors(width)
    expected = [STORED[codec.name](vector) for vector in given.view(-1, width).tolist()]
    assert torch.equal(stored(codec, given), torch.tensor(expected).view_as(given))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_read_as_they_came(codec: Codec, dtype: torch.dtype) -> None:
    given = vectors(16)[:, :, 30:].to(dtype)
    assert stored(codec, given).dtype is dtype
    assert torch.equal(stored(codec, given), stored(codec, given.float()).to(dtype))


@EVERY
@pytest.mark.parametrize("width", WIDTHS)
def test_every_vector_is_stored_for_itself(codec: Codec, width: int) -> None:
    """In whatever company, order and strides it comes: to the bit."""
    given = vectors(width)
    whole = codec.encode(given)
    assert whole.shape == (2, 3, 40, codec.record_bytes(width))
    assert whole.dtype is torch.uint8
    parts = [codec.encode(part) for part in given.transpose(1, 2).split([1, 4, 35], 1)]
    assert torch.equal(torch.cat(parts, 1).transpose(1, 2), whole)
    assert torch.equal(codec.decode(whole[1:, :, 7:9], width, torch.float32), stored(codec, given)[1:, :, 7:9])


@EVERY
def test_none_at_all(codec: Codec) -> None:
    assert codec.encode(torch.empty(2, 3, 0, 8)).shape == (2, 3, 0, codec.record_bytes(8))
    assert codec.decode(codec.encode(torch.empty(2, 3, 0, 8)), 8, torch.float64).shape == (2, 3, 0, 8)


@EVERY
def test_a_record_of_zeros_is_a_vector_of_zeros(codec: Codec) -> None:
    records = torch.zeros(2, codec.record_bytes(20), dtype=torch.uint8)
    assert numbers(codec.decode(records, 20, torch.float32)) == numbers(torch.zeros(2, 20))


@EVERY
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_nothing_odd_becomes_finite(codec: Codec, odd: float) -> None:
    given = vectors(40)[0, 0, 30:33]
    given[1, 3] = odd
    out = stored(codec, given)
    assert not out[1, 3].isfinite()
    assert torch.equal(out[[0, 2]], stored(codec, given[[0, 2]]))


@pytest.mark.parametrize(("name", "share"), [("int8", 0.30), ("float8_e4m3fn", 0.30), ("int4", 0.17), ("float16", 0.5)])
def test_bytes_at_the_usual_width(name: str, share: float) -> None:
    assert CODECS[name].record_bytes(64) <= share * 64 * 4


def test_keys_and_values_may_differ() -> None:
    key, value = vectors(16)
    coding = Coding.of(("int8", None), 16, torch.float32)
    records, plain = coding.encoded(key, value)
    assert records.dtype is torch.uint8
    assert plain is value
    assert torch.equal(coding.decoded(records, plain)[0], stored(CODECS["int8"], key))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, None),
        ((None, None), None),
        ("int4", ("int4", "int4")),
        (torch.int8, ("int8", "int8")),
        (torch.float8_e4m3fn, ("float8_e4m3fn",) * 2),
        ((torch.bfloat16, "int8"), ("bfloat16", "int8")),
        ((None, "int8"), (None, "int8")),
    ],
)
def test_names(given: object, names: object) -> None:
    assert codec_names(given) == names


@pytest.mark.parametrize(
    "given", ["int3", torch.int16, 8, ("int8",), ("int8", "int8", "int8"), ["int8", 4], "torch.int8"]
)
def test_what_there_is_not_is_refused_by_name(given: object) -> None:
    with pytest.raises(ArgumentError, match="cache_dtype: expected None, one of 'float32'"):
        codec_names(given)
