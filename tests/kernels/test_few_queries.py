"""Attention of few queries by the compiled kernel, against plain loops in float64."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.positioned import check, exact, in_parts, inputs
from transformer.kernels import Kernel, backend
from transformer.kernels.compiled import are_available
from transformer.kernels.few_queries import attend_few, is_readable
from transformer.kernels.position_inputs import DistanceBias, PositionedSinks, Positions

pytestmark = pytest.mark.skipif(not are_available(), reason="numba is missing, or turned off")

DTYPES = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with in_parts(request.param) as number:
        yield number


SHAPES = [
    (1, 4, 4, 1, 70, 64),
    (2, 4, 2, 1, 65, 64),
    (1, 6, 2, 1, 33, 32),
    (1, 4, 1, 1, 200, 128),
    (1, 16, 1, 1, 130, 64),
    (2, 14, 2, 1, 17, 16),
    (1, 5, 1, 3, 40, 80),
    (1, 2, 1, 9, 9, 24),
    (3, 1, 1, 1, 1, 5),
    (1, 24, 1, 2, 100, 8),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_keys_and_causal_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = inputs(*shape, dtype)
    keys, length = shape[4], shape[3]
    check(attend_few(*given, 0.3), exact(*given, 0.3, Positions((0,), (0,), (keys,), (0,), causal=False)), dtype)
    right = exact(*given, 0.3, Positions((0,), (0,), (keys,), (keys - length,)))
    check(attend_few(*given, 0.3, causal=True), right, dtype)


@pytest.mark.parametrize("window", [None, 1, 7, 64, 90])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 3])
def test_ragged_rows_and_windows(window: int | None, causal: bool, length: int) -> None:
    """Each row has its own first column, tokens and position; what lies beyond them is NaN."""
    query, key, value = inputs(3, 4, 2, length, 100, 16)
    past = 110 - length, 40 - length, 50
    positions = Positions((10, 0, 5), (10, 4, 50), (110, 40, 52), past, causal, window)
    for row, (first, start, end, _) in enumerate(zip(*positions[:4], strict=True)):
        for tensor in (key, value):
            tensor[row, :, : start - first] = math.nan
            tensor[row, :, end - first :] = math.nan
    check(attend_few(query, key, value, 0.3, positions=positions), exact(query, key, value, 0.3, positions))


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("biased", [False, True])
def test_sinks(length: int, window: int | None, biased: bool) -> None:
    """Queries of their own at clamped positions; a short row sees its first tokens in its window instead."""
    query, key, value = inputs(3, 4, 2, length, 40, 16)
    positions = Positions((60, 2, 0), (60, 2, 0), (100, 30, 9), (100 - length, 30 - length, 9 - length), True, window)
    sinks = PositionedSinks(torch.randn(3, 4, length, 16), *torch.randn(2, 3, 2, 4, 16), 23)
    slopes = -torch.rand(4)
    bias = DistanceBias(slopes=slopes) if biased else None
    found = attend_few(query, key, value, 0.3, positions=positions, sinks=sinks, bias=bias)
    check(found, exact(query, key, value, 0.3, positions, sinks=sinks, slope=slopes if biased else None))


@pytest.mark.parametrize("shape", [(2, 4, 4, 1, 100, 16), (1, 4, 1, 1, 100, 16), (1, 8, 1, 3, 80, 16)], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("causal", [True, False])
def test_biases_of_distances(shape: tuple[int, ...], softcap: float | None, causal: bool) -> None:
    """By slopes, and by a table whose ends stand for all distances beyond them."""
    given = inputs(*shape)
    heads, length, keys = shape[1], shape[3], shape[4]
    positions = Positions((5,), (5,), (5 + keys,), (5 + keys - length - 30,), causal)
    slopes = -torch.rand(heads) / 8
    found = attend_few(*given, 0.3, positions=positions, bias=DistanceBias(slopes=slopes), softcap=softcap)
    check(found, exact(*given, 0.3, positions, slope=slopes, softcap=softcap))
    numbers = torch.randn(40)
    table = numbers * torch.arange(1, heads + 1).unsqueeze(1)
    found = attend_few(*given, 0.3, positions=positions, bias=DistanceBias(table=table, first=-8), softcap=softcap)
    number = {distance: float(numbers[min(max(distance + 8, 0), 39)]) for distance in range(-keys, keys)}
    check(found, exact(*given, 0.3, positions, number=number, softcap=softcap))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_soft_caps(softcap: float) -> None:
    """Near 0, where the tangent is its argument, and far from it."""
    query, key, value = inputs(1, 4, 2, 1, 90, 64)
    positions = Positions((0,), (0,), (90,), (89,))
    for size in (1e-3, 1.0, 100.0):
        found = attend_few(query * size, key, value, 0.3, softcap=softcap)
        check(found, exact(query * size, key, value, 0.3, positions, softcap=softcap))


def test_sixteen_bits_are_as_near_as_sdpa() -> None:
    for dtype, heads, groups in itertools.product((torch.bfloat16, torch.float16), (4, 8), (4, 1)):
        query, key, value = inputs(1, heads, groups, 1, 300, 64, dtype)
        right = exact(query, key, value, 0.125, Positions((0,), (0,), (300,), (299,)))
        theirs = F.scaled_dot_product_attention(query, key, value, scale=0.125, enable_gqa=True)
        error = (attend_few(query, key, value, 0.125).double() - right).abs().max()
        assert error <= 2 * (theirs.double() - right).abs().max() + 1e-5


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_in_keys(number: float, dtype: torch.dtype, groups: int) -> None:
    """As in a softmax: NaN spoils the rows of its head and no other; a score of -inf hides its key."""
    query, key, value = inputs(2, 4, groups, 1, 100, 64, dtype)
    query = query.abs()
    key[1, 0, 77] = number
    found = attend_few(query, key, value, 0.3)
    wide = [x.float() for x in (query, key, value)]
    right = F.scaled_dot_product_attention(*wide, scale=0.3, enable_gqa=True)
    assert found.isnan().equal(right.isnan())
    assert found.isnan().any() == (number != -math.inf)
    torch.testing.assert_close(found.float(), right, rtol=0, atol=2e-2, equal_nan=True)
    key[1, 0] = -math.inf
    assert attend_few(query, key, value, 0.3)[1, 0].isnan().all(), "no score to take a difference of"


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nan_and_infinity_in_values(number: float) -> None:
    query, key, value = inputs(1, 4, 2, 1, 100, 16)
    value[0, 0, 50, 3] = number
    found = attend_few(query, key, value, 0.3)
    assert found[0, :2, :, 3].isnan().all() if math.isnan(number) else found[0, :2, :, 3].isinf().all()
    assert found[0, :2, :, :3].isfinite().all()
    assert found[0, 2:].isfinite().all()


def test_a_row_without_a_key_is_zero() -> None:
    query, key, value = inputs(2, 4, 2, 2, 20, 16)
    positions = Positions((0,), (0, 7), (20, 7), (18, 7))
    key[1], value[1] = math.nan, math.nan
    found = attend_few(query, key, value, 0.3, positions=positions)
    assert found[0].isfinite().all()
    assert (found[1] == 0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_of_all_bits_stays_nan(dtype: torch.dtype, softcap: float | None) -> None:
    """The bits of CUDA's NaN, in a key and in a value: NaN to what sees it, nothing to the other head."""
    for place in (1, 2):
        given = inputs(1, 4, 2, 2, 300, 16, dtype)
        expected = attend_few(*given, 0.3, softcap=softcap)
        bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
        if dtype is torch.bfloat16:
            bits = torch.tensor([0x7FFF], dtype=torch.int16).view(dtype)
        given[place][0, 1, 7, 3] = bits[0]
        found = attend_few(*given, 0.3, softcap=softcap)
        assert torch.equal(found[:, :2], expected[:, :2])
        assert found[:, 2:].isnan().flatten(0, 2)[:, 3].all()
        assert place == 2 or found[:, 2:].isnan().all()


def test_tensors_that_do_not_fit_are_not_read() -> None:
    query, key, value = inputs(2, 4, 2, 1, 20, 16)
    assert is_readable(query, key, value)
    assert not is_readable(query, key.to("meta"), value)
    assert not is_readable(query, key, value.to("meta"))
    assert not is_readable(query, key, value[..., :8])
    assert not is_readable(query, key[..., :8], value[..., :8])
    assert not is_readable(query, key, value[:, :, 1:])
    assert not is_readable(query, key, value[:, :1])
    assert not is_readable(query, key[:1], value[:1])


def test_values_of_another_width_are_served_by_other_ways() -> None:
    query, key, value = inputs(2, 4, 2, 1, 20, 16)
    for narrow in (value[..., :8], torch.cat((value, value), -1)):
        right = F.scaled_dot_product_attention(query, key, narrow, scale=0.3, enable_gqa=True)
        for asked in (None, "sdpa", "matmul", "reference"):
            with backend(asked):
                found, _ = Kernel(0.3)(query, key, narrow)
            torch.testing.assert_close(found, right, rtol=0, atol=2e-6)


def test_the_order_of_threads_changes_nothing() -> None:
    given = inputs(1, 4, 1, 1, 2000, 64)
    first = attend_few(*given, 0.3)
    assert all(attend_few(*given, 0.3).equal(first) for _ in range(20))


def test_two_python_threads_at_once() -> None:
    given, found = inputs(1, 4, 2, 1, 500, 64), []
    right = attend_few(*given, 0.3)

    def work() -> None:
        with torch.no_grad():
            found.extend(attend_few(*given, 0.3) for _ in range(50))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 100
    assert all(out.equal(right) for out in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_runs_in_its_own_thread() -> None:
    given = inputs(1, 4, 2, 1, 500, 64)
    right = attend_few(*given, 0.3)
    child = os.fork()
    if child == 0:
        near = torch.allclose(attend_few(*given, 0.3), right, rtol=0, atol=1e-5)
        os._exit(0 if near else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_interrupt_is_raised_after_the_kernel() -> None:
    """The result of the call is lost, and the tensors that it read are as they were."""
    given = inputs(1, 4, 2, 1, 500, 64)
    before = [x.clone() for x in given]
    right = attend_few(*given, 0.3)
    timer = threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,))

    def work() -> None:
        while True:
            attend_few(*given, 0.3)

    # A process that was started in the background ignores the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    assert attend_few(*given, 0.3).equal(right)
