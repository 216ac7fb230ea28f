"""RMS norm and rotation by compiled kernels: rounded once, for every layout and number of threads, and who asks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.internals import without_compiled_kernels
from transformer.blocks import RMSNorm
from transformer.kernels import Backend, backend, rms_norm, rotate_in_one_pass, tuned
from transformer.kernels.compiled import are_available, may_compute
from transformer.positions import LinearScaling, RotaryEmbedding
from transformer.positions.scheme import RotaryTable

DTYPES = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of each result: float32's promise, and half a step of the 16-bit dtypes."""

pytestmark = pytest.mark.skipif(not are_available(), reason="numba is missing, or turned off")

THREADS = [pytest.param(1 << 40, id="one thread"), pytest.param(0, id="threads")]


def heads(batch: int, number: int, length: int, width: int, dtype: torch.dtype) -> Tensor:
    """As projections give them: [B, H, L, D], of which tokens come first in memory."""
    return torch.randn(batch, length, number, width).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_norm_is_rounded_once(dtype: torch.dtype, unit_offset: bool, threads: int) -> None:
    for shape in ((1, 1, 64), (3, 1, 7), (2, 37, 96), (5, 1), (9,)):
        x, weight = 3 * torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        exact = exact * (weight.double() + unit_offset)
        with tuned(min_parallel_bytes=threads):
            out = rms_norm(x, weight, 1e-5, unit_offset)
        assert out.dtype is dtype
        assert out.shape == x.shape
        torch.testing.assert_close(out.double(), exact, rtol=ROUNDING[dtype] + 1e-6, atol=1e-6)


@torch.no_grad()
def test_a_norm_keeps_what_is_no_number_to_its_row() -> None:
    x = torch.randn(4, 1, 32)
    expected = rms_norm(x, torch.ones(32), 1e-6)
    x[1, 0, 3], x[2, 0, 5] = float("nan"), float("inf")
    out = rms_norm(x, torch.ones(32), 1e-6)
    assert out[1].isnan().all()
    assert out[2].isnan().sum() == 1
    assert torch.equal(out[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_both_are_rotated_and_rounded_once(dtype: torch.dtype, interleaved: bool, threads: int) -> None:
    """Runs of positions and rows of their own, whole heads and parts, tokens that lie apart."""
    for rotary_dim, positions in ((16, range(70, 71)), (6, range(5)), (16, torch.tensor([[3, 9, 1], [0, 4, 2000]]))):
        rotation = RotaryEmbedding(16, rotary_dim=rotary_dim, interleaved=interleaved, scaling=LinearScaling(2.0))
        batch, length = (3, len(positions)) if isinstance(positions, range) else positions.shape
        query, key = heads(batch, 6, length, 16, dtype), heads(batch, 2, length, 16, dtype)
        exact = rotation.table(positions, query.double())
        with tuned(min_parallel_bytes=threads):
            rotated = rotation.rotate_both(query, key, rotation.table(positions, query))
        for given, out in zip((query, key), rotated, strict=True):
            right = rotation.rotate(given.double(), exact)
            assert out.dtype is dtype
            torch.testing.assert_close(out.double(), right, rtol=ROUNDING[dtype], atol=1e-5)
            assert torch.equal(out[..., rotary_dim:], given[..., rotary_dim:])


@torch.no_grad()
def test_other_layouts_and_kinds_of_rotation_are_rotated_one_by_one() -> None:
    rotation, query, key = RotaryEmbedding(8), heads(1, 2, 3, 8, torch.float32), heads(1, 1, 3, 8, torch.float32)
    table = rotation.table(range(3, 6), query)

    def in_one_pass(query: Tensor, key: Tensor) -> bool:
        return rotate_in_one_pass(query, key, *table, False) is not None

    assert in_one_pass(query, key)
    assert not in_one_pass(query.double(), key.double())
    assert not in_one_pass(query, key.half())
    assert not in_one_pass(query.transpose(2, 3).contiguous().transpose(2, 3), key)
    assert not in_one_pass(torch.randn(1, 2, 3, 12)[..., :8], key)
    with torch.enable_grad():
        assert not in_one_pass(query, key)
    with torch.autocast("cpu", torch.bfloat16):
        assert not in_one_pass(query, key)

    class Reversed(RotaryEmbedding):
        def rotate(self, x, table):
            return super().rotate(x, table).flip(-1)

    rotated = Reversed(8).rotate_both(query, key, table)
    for given, out in zip((query, key), rotated, strict=True):
        assert torch.equal(out, rotation.rotate(given, table).flip(-1))


@torch.no_grad()
def test_a_table_that_only_broadcasts_is_not_read() -> None:
    query, key = heads(2, 4, 3, 8, torch.float32), heads(2, 2, 3, 8, torch.float32)
    for shape in ((3, 8), (1, 1, 3, 8), (2, 1, 3, 8), (3, 6)):
        cos, sin = torch.randn(2, *shape)
        assert rotate_in_one_pass(query, key, cos, sin, False) is not None
        for other in (sin[..., 1:], sin.double(), sin.to("meta"), sin.unsqueeze(0)):
            assert rotate_in_one_pass(query, key, cos, other, False) is None
        assert rotate_in_one_pass(query, key, cos.to("meta"), sin.to("meta"), False) is None
        assert rotate_in_one_pass(query, key[:, :, :2], cos, sin, False) is None
    for shape in ((1, 8), (8,), (3, 1), (3, 3), (3, 10), (4, 8), (1, 3, 8), (2, 3, 8), (1, 2, 3, 8), (2, 1, 1, 8)):
        cos, sin = torch.randn(2, *shape)
        assert rotate_in_one_pass(query, key, cos, sin, False) is None


@torch.no_grad()
def test_a_table_of_a_subclass_is_read_as_it_broadcasts() -> None:
    class Still(RotaryEmbedding):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__(8)
            self.shape = shape

        def table(self, positions, like=None):
            generator = torch.Generator().manual_seed(0)
            return RotaryTable(*torch.randn(2, *self.shape, generator=generator))

    query, key = heads(2, 4, 3, 8, torch.float32), heads(2, 2, 3, 8, torch.float32)
    for shape in ((1, 8), (8,), (3, 1), (3, 8), (2, 1, 3, 8), (2, 1, 1, 8)):
        rotation = Still(shape)
        table = rotation.table(range(3), query)
        rotated = rotation.rotate_both(query, key, table)
        for given, out in zip((query, key), rotated, strict=True):
            torch.testing.assert_close(out, rotation.rotate(given, table), rtol=0, atol=1e-6)


@pytest.mark.parametrize("asked", [*Backend, None])
@torch.no_grad()
def test_who_asks_for_compiled_attention_gets_all_kernels(asked: Backend | None) -> None:
    """Norms, rotation and projections as without a request; another backend leaves them out."""
    query, key = heads(1, 4, 1, 8, torch.float32), heads(1, 2, 1, 8, torch.float32)
    table = RotaryEmbedding(8).table(range(5, 6), query)
    wanted = asked in (None, Backend.COMPILED)
    with backend(asked):
        assert may_compute(query) == wanted
        assert (rotate_in_one_pass(query, key, *table, False) is not None) == wanted
        with backend(None):
            assert may_compute(query)
        assert may_compute(query) == wanted
    assert may_compute(query)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_without_numba_it_is_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, rotation = RMSNorm(16, dtype=dtype), RotaryEmbedding(16)
    x, query, key = torch.randn(2, 1, 16).to(dtype), heads(2, 4, 1, 16, dtype), heads(2, 2, 1, 16, dtype)
    table = rotation.table(range(9, 10), query)
    compiled = norm(x), *rotation.rotate_both(query, key, table)
    without_compiled_kernels(monkeypatch)
    assert rotate_in_one_pass(query, key, *table, False) is None
    step = torch.finfo(dtype).eps
    for one, other in zip(compiled, (norm(x), *rotation.rotate_both(query, key, table)), strict=True):
        torch.testing.assert_close(one, other, rtol=2 * step, atol=2 * step)


@torch.no_grad()
def test_a_weight_of_another_kind_is_left_to_pytorch() -> None:
    """Such as one that is sharded: what its own operations give, they alone know."""
    seen = []

    class Sharded(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs)

    x, weight = torch.randn(1, 1, 8), torch.rand(8)
    out = rms_norm(x, weight.as_subclass(Sharded), 1e-6)
    assert {"mul_", "rms_norm"} & {*seen}
    torch.testing.assert_close(out.as_subclass(Tensor), rms_norm(x, nn.Parameter(weight), 1e-6))
