"""Records of new keys and values by the compiled kernel: the bytes that the codecs make with PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transformer import GroupQueryAttention
from transformer.codecs import CODECS, CodecNames, Coding
from transformer.codecs.int4 import GROUP, HEADER_BYTES
from transformer.kernels import backend, encoding, tuned
from transformer.kernels.compiled import are_available

pytestmark = pytest.mark.skipif(not are_available(), reason="numba is missing, or turned off")

DTYPES = torch.float32, torch.bfloat16, torch.float16
PAIRS = [*((name, name) for name in CODECS), ("int8", "int4"), ("float8_e4m3fn", None), (None, "bfloat16")]
WIDTHS = 5, 16, 20, 31, 64, 80, 128


@pytest.fixture(autouse=True, params=[pytest.param(1 << 40, id="one thread"), pytest.param(0, id="threads")])
def inference(request: pytest.FixtureRequest):
    with tuned(min_parallel_bytes=request.param), torch.no_grad():
        yield


def vectors(width: int, dtype: torch.dtype, count: int = 400) -> Tensor:
    """Random ones of all sizes, and extreme ones: [count, width]."""
    numbers = (
        torch.randn(count, width, dtype=torch.float64)
        * torch.logspace(-46, 38, count, 10, dtype=torch.float64)[:, None]
    )
    numbers[: count // 2] = torch.randn(count // 2, width)
    numbers = numbers.to(dtype)
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    # Ties: halves of steps in int8, and of numbers of float8, where the largest number is that of the codec.
    for row, most in enumerate((127.0, 448.0, 15.0)):
        numbers[row] = (torch.arange(width) % 254 - 126.5) * (most / 127 if most != 448.0 else 1.0)
        numbers[row, 0] = most
    numbers[3] = torch.arange(width) / 2
    numbers[4] = 2.0**-6 / 16 * torch.arange(width)
    numbers[4, 0] = 448.0
    for row, number in enumerate((0.0, 1.0, -2.5, tiny, tiny / 8, largest, -largest), 5):
        numbers[row] = number
    numbers[12] = largest * (torch.arange(width) % 2 * 2 - 1)
    numbers[13, ::2] = 0.0
    numbers[14, 1::3] = tiny / 4
    for row, number in enumerate((math.nan, math.inf, -math.inf), 15):
        numbers[row, row % width] = number
    numbers[18, :2] = torch.tensor((math.inf, -math.inf))
    numbers[19] = math.nan
    numbers[20] = -numbers[20].abs()
    return numbers


def same(name: str | None, found: Tensor, wanted: Tensor, width: int) -> None:
    """Equal bytes, but for which NaN and which zero a scale or a header is."""
    if name is None:
        assert found is wanted
        return
    assert found.shape == wanted.shape
    ends = {"int4": HEADER_BYTES * -(-width // GROUP), "int8": 4, "float8_e4m3fn": 4}
    end = ends.get(name, found.shape[-1])
    dtype = {"int4": torch.bfloat16, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)
    head, its_head = (each[..., :end].contiguous().view(dtype).float() for each in (found, wanted))
    torch.testing.assert_close(head, its_head, rtol=0, atol=0, equal_nan=True)
    if end == found.shape[-1] or name == "int4":
        assert (head.signbit() == its_head.signbit())[(head != 0) & ~head.isnan()].all()
    differ = (found[..., end:] != wanted[..., end:]).any(-1).nonzero()
    assert not len(differ), (differ.tolist(), found[tuple(differ[0])], wanted[tuple(differ[0])])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", PAIRS, ids=str)
def test_the_bytes_of_the_codecs(names: CodecNames, dtype: torch.dtype) -> None:
    """Of tokens as projections give them, [B, G, L, D] of which tokens come first in memory."""
    torch.manual_seed(0)
    for width in WIDTHS:
        coding = Coding.of(names, width, dtype)
        both = vectors(width, dtype), vectors(width, dtype)
        key, value = (each.view(2, 40, 5, width).transpose(1, 2) for each in both)
        for name, found, wanted in zip(
            names, encoding.encoded(coding, key, value), coding.encoded(key, value), strict=True
        ):
            same(name, found, wanted, width)


class Watch:
    """Stands for a codec, and says whether PyTorch was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, encode = 0, CODECS["int8"].encode

        def watched(numbers: Tensor) -> Tensor:
            self.asked += 1
            return encode(numbers)

        monkeypatch.setattr(CODECS["int8"], "encode", watched)

    def by_torch(self, coding: Coding, key: Tensor, value: Tensor) -> bool:
        before, wanted = self.asked, None
        found = encoding.encoded(coding, key, value)
        asked = self.asked > before
        wanted = coding.encoded(key, value)
        assert all(map(torch.equal, found, wanted))
        return asked


def test_who_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, layouts and shapes, gradients, autocast, another backend; without an error, with the same bytes."""
    coding, watch = Coding.of(("int8", "int8"), 16, torch.float32), Watch(monkeypatch)
    key, value = torch.randn(2, 2, 3, 5, 16)
    assert not watch.by_torch(coding, key, value)
    assert not watch.by_torch(coding, key[:, :, 1:, :], value[:, :, 1:])
    assert watch.by_torch(coding, key.double(), value.double())
    assert watch.by_torch(coding, key, value.half())
    assert watch.by_torch(coding, key, value[:, :, :3])
    assert watch.by_torch(coding, key[..., :8], value[..., :8])
    assert watch.by_torch(coding, key[:, :, :0], value[:, :, :0])
    assert watch.by_torch(coding, key.transpose(2, 3).contiguous().transpose(2, 3), value)
    with backend("sdpa"):
        assert watch.by_torch(coding, key, value)
    with torch.enable_grad():
        assert watch.by_torch(coding, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        assert watch.by_torch(coding, key, value)


def test_a_cache_encodes_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    module = GroupQueryAttention(32, 4, 2, True, True, cache_dtype="int8")
    for length in (5, 1, 3):
        module(torch.randn(2, length, 32))
        watch.asked = watch.asked if length < 5 else 0
    assert watch.asked == 0
