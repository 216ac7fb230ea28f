"""Attention of few queries over records of codecs, against plain loops in float64 over the numbers that they hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.positioned import check, exact, in_parts
from transformer.codecs import CODECS, CodecNames, Coding
from transformer.kernels import (
    DistanceBias,
    Kernel,
    Positioned,
    PositionedSinks,
    Positions,
    attend_few,
    backend,
    by_positions,
    reads_positions,
)
from transformer.kernels.compiled import are_available
from transformer.kernels.few_queries import is_readable

pytestmark = pytest.mark.skipif(not are_available(), reason="numba is missing, or turned off")

DTYPES = torch.float32, torch.bfloat16, torch.float16
ALIKE = [(name, name) for name in CODECS]
DIFFERENT = [
    ("int8", "int4"),
    ("int4", None),
    (None, "float8_e4m3fn"),
    ("bfloat16", "int8"),
    ("float32", "float16"),
    (None, None),
]


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with in_parts(request.param) as number:
        yield number


def within(stored: Tensor, slots: int = 7) -> Tensor:
    """The same as a part of a larger buffer, whose other slots have all bits set: NaN in every codec."""
    batch, groups, keys, width = stored.shape
    buffer = torch.full((batch + 1, groups, keys + slots, width * stored.itemsize), 255, dtype=torch.uint8)
    part = buffer.view(stored.dtype)[1:, :, 3 : keys + 3]
    return part.copy_(stored)


class Case:
    """Queries, keys and values of a shape, stored by codecs, and the numbers that they then are."""

    def __init__(
        self, names: CodecNames, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        batch, heads, groups, length, keys, head_dim = shape
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.coding = Coding.of(names, head_dim, dtype)
        self.query = random(batch, length, heads, head_dim).to(dtype).transpose(1, 2)
        # Channels and tokens of different sizes.
        sizes = ((random(head_dim) + random(keys, 1)) / 2).exp()
        numbers = random(2, batch, groups, keys, head_dim) * sizes / 2
        self.key, self.value = map(within, self.coding.encoded(*(each.to(dtype) for each in numbers)))

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they are, in float32."""
        return self.coding.read_as(torch.float32).decoded(self.key, self.value)

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


SHAPES = [
    (1, 4, 4, 1, 70, 64),
    (2, 4, 2, 1, 65, 64),
    (1, 8, 2, 1, 64, 128),
    (1, 6, 2, 1, 33, 96),
    (1, 3, 1, 8, 130, 16),
    (2, 2, 2, 2, 40, 80),
    (1, 5, 1, 3, 40, 20),
    (3, 1, 1, 1, 1, 5),
    (1, 16, 1, 1, 80, 64),
    (1, 2, 1, 4, 20, 48),
]
"""Rows, heads, key/value heads, tokens, keys, head_dim: whole blocks and groups of channels, and parts of them."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [*ALIKE, *DIFFERENT], ids=str)
def test_all_keys_and_causal_order(names: CodecNames, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        case, keys, length = Case(names, shape, dtype), shape[4], shape[3]
        for causal in (False, True)[length == 1 :]:
            right = exact(case.query, *case.numbers(), 0.3, Positions((0,), (0,), (keys,), (keys - length,), causal))
            check(attend_few(*case.given, 0.3, causal=causal, coding=case.coding), right, dtype)


@pytest.mark.parametrize("width", [5, 16, 20, 32, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", CODECS)
def test_a_single_value_is_its_decoded_numbers(name: str, width: int) -> None:
    """Exactly, with a weight of 1; also the largest numbers and those of the fewest bits."""
    case = Case((name, name), (2, 4, 2, 1, 1, width))
    for size in (1.0, 1e30, 1e-30, 1e-42, 0.0):
        numbers = case.numbers()[1] * size
        stored = within(case.coding.encoded(numbers, numbers)[1])
        found = attend_few(case.query, torch.zeros_like(case.key), stored, 0.3, coding=case.coding)
        wanted = case.coding.decoded_value(stored).repeat_interleave(2, 1)
        assert torch.equal(found, wanted), size


def test_every_number_of_float8() -> None:
    coding = Coding.of((None, "float8_e4m3fn"), 16, torch.float32)
    codes = torch.arange(256, dtype=torch.uint8).view(16, 1, 1, 16)
    for scale in (1.0, 0.37, 2.0**-130):
        scales = torch.full((16, 1, 1, 1), scale).view(torch.uint8)
        stored, query = torch.cat((scales, codes), -1), torch.randn(16, 1, 1, 16)
        found = attend_few(query, torch.zeros(16, 1, 1, 16), stored, 0.3, coding=coding)
        torch.testing.assert_close(found, coding.decoded_value(stored), rtol=0, atol=0, equal_nan=True)
        assert found.isnan().sum() == 2


@pytest.mark.parametrize("window", [None, 7, 90])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("names", [*ALIKE, ("int4", "int8")], ids=str)
def test_ragged_rows_and_windows(names: CodecNames, causal: bool, window: int | None) -> None:
    """Each row has its own first column, tokens and position; what lies beyond them is NaN."""
    for length, width in ((1, 16), (2, 20)):
        case = Case(names, (3, 4, 2, length, 100, width))
        past = 110 - length, 40 - length, 50
        positions = Positions((10, 0, 5), (10, 4, 50), (110, 40, 52), past, causal, window)
        right = exact(case.query, *case.numbers(), 0.3, positions)
        for row, (first, start, end, _) in enumerate(zip(*positions[:4], strict=True)):
            for tensor in (case.key, case.value):
                tensor[row, :, : start - first] = 255
                tensor[row, :, end - first :] = 255
        check(attend_few(*case.given, 0.3, positions=positions, coding=case.coding), right)


@pytest.mark.parametrize("names", [*ALIKE, ("int8", None)], ids=str)
def test_sinks_windows_and_biases(names: CodecNames) -> None:
    """Sinks are records, too; a short row sees its first tokens in its window instead."""
    for length, window, biased, dtype in itertools.product((1, 2), (None, 20), (False, True), DTYPES[:2]):
        case, its = Case(names, (3, 4, 2, length, 40, 16), dtype), Case(names, (3, 4, 2, length, 4, 16), dtype, seed=1)
        past = 100 - length, 30 - length, 9 - length
        positions = Positions((60, 2, 0), (60, 2, 0), (100, 30, 9), past, True, window)
        slopes = -torch.rand(4)
        found = attend_few(
            *case.given,
            0.3,
            positions=positions,
            sinks=PositionedSinks(*its.given, 23),
            bias=DistanceBias(slopes=slopes) if biased else None,
            coding=case.coding,
        )
        sinks = PositionedSinks(its.query, *its.numbers(), 23)
        right = exact(case.query, *case.numbers(), 0.3, positions, sinks=sinks, slope=slopes if biased else None)
        check(found, right, dtype)


@pytest.mark.parametrize("names", ALIKE, ids=str)
def test_tables_of_distances_and_soft_caps(names: CodecNames) -> None:
    for shape, softcap in itertools.product(((2, 4, 4, 1, 100, 16), (1, 8, 1, 3, 80, 64)), (None, 2.0)):
        case, heads, keys = Case(names, shape), shape[1], shape[4]
        positions = Positions((5,), (5,), (5 + keys,), (5 + keys - shape[3],))
        numbers = torch.randn(40)
        bias = DistanceBias(table=numbers * torch.arange(1, heads + 1).unsqueeze(1), first=-8)
        number = {distance: float(numbers[min(max(distance + 8, 0), 39)]) for distance in range(-keys, keys)}
        found = attend_few(*case.given, 0.3, positions=positions, bias=bias, softcap=softcap, coding=case.coding)
        check(found, exact(case.query, *case.numbers(), 0.3, positions, number=number, softcap=softcap))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(2, 4, 4, 1, 100, 64), (2, 4, 1, 1, 100, 20)], ids=str)
def test_what_is_no_number_stays_none(name: str, shape: tuple[int, ...], number: float) -> None:
    """It spoils what its decoded numbers would, in its row and head, and nothing else."""
    for place in (0, 1):
        case = Case((name, name), shape)
        numbers = case.numbers()
        numbers[place][1, 0, 77, 3] = number
        key, value = case.coding.encoded(*numbers)
        wide = [each.double() for each in case.coding.decoded(key, value)]
        scores = case.query.double() @ wide[0].repeat_interleave(4 // shape[2], 1).transpose(2, 3) * 0.3
        right = scores.softmax(-1) @ wide[1].repeat_interleave(4 // shape[2], 1)
        found = attend_few(case.query, key, value, 0.3, coding=case.coding)
        assert found.isnan().equal(right.isnan())
        assert found[1].isnan().any() or "float" in name
        assert found[0].isfinite().all()
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_order_of_threads_changes_nothing() -> None:
    case = Case(("int4", "int8"), (1, 4, 1, 1, 2000, 64))
    first = attend_few(*case.given, 0.3, coding=case.coding)
    assert all(attend_few(*case.given, 0.3, coding=case.coding).equal(first) for _ in range(20))


def test_what_does_not_fit_is_not_read() -> None:
    case = Case(("int8", None), (2, 4, 2, 1, 20, 24))
    (query, key, value), coding = case.given, case.coding
    assert is_readable(query, key, value, coding)
    assert not is_readable(query, key, value), "records are no numbers"
    assert not is_readable(query, key, value, Coding.of(("int4", None), 24, torch.float32))
    assert not is_readable(query, key, value, Coding.of(("int8", "int8"), 24, torch.float32))
    assert not is_readable(query, key, value, Coding.of(("int8", None), 23, torch.float32))
    assert not is_readable(query, key.view(torch.int8), value, coding)
    assert not is_readable(query, key[..., :24], value, coding)
    assert not is_readable(query, key[:, :, 1:], value, coding)
    assert not is_readable(query, key[:1], value[:1], coding)
    assert not is_readable(query, key, value.half(), coding)
    assert not is_readable(query.double(), key, value.double(), coding)
    assert not is_readable(query, key.to("meta"), value, coding)
    assert not is_readable(query, key.transpose(2, 3).contiguous().transpose(2, 3), value, coding)
    with torch.enable_grad():
        assert not is_readable(query, key, value, coding)


@pytest.mark.parametrize("names", ALIKE, ids=str)
def test_by_positions(names: CodecNames, caplog: pytest.LogCaptureFixture) -> None:
    case, kernel, positions = Case(names, (2, 4, 2, 3, 50, 64)), Kernel(0.3, 5.0), Positions((0,), (0,), (50,), (47,))
    assert reads_positions(kernel, *case.given, coding=case.coding)
    with backend("sdpa"):
        assert not reads_positions(kernel, *case.given, coding=case.coding)
    with caplog.at_level("DEBUG", "transformer.kernels"):
        found = by_positions(kernel, *case.given, Positioned(positions), coding=case.coding)
    assert "compiled" in caplog.text
    check(found, exact(case.query, *case.numbers(), 0.3, positions, softcap=5.0))
