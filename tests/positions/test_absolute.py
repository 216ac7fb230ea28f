"""Absolute positions, compared with plain loops: rows of any length and padding, in any split."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conversations import assert_same
from tests.positions.absolutes import MODULES, WIDTH, attention, expected, learned, of, sinusoid, step_of
from tests.setups import padding, tokens
from transformer.positions import AbsolutePositions, LearnedPositions, SinusoidalPositions

FAR = 4_000_000


class Sines(TorchDispatchMode):
    """How many sines each operation formed that forms some."""

    def __init__(self) -> None:
        super().__init__()
        self.formed: list[int] = []

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is torch.ops.aten.sin.default:
            self.formed.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> AbsolutePositions:
    return MODULES[request.param]()


CALLS = st.integers(1, 3).flatmap(
    lambda batch: st.integers(1, 9).flatmap(
        lambda length: st.tuples(
            st.none()
            | st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch),
            st.lists(st.integers(0, length), max_size=4).map(lambda cuts: [0, *sorted(cuts), length]),
            st.just((batch, length)),
        )
    )
)


@pytest.mark.slow
@settings(max_examples=150)
@given(CALLS, st.sampled_from((learned, lambda: SinusoidalPositions(WIDTH, 50.0))))
def test_any_cut_is_one_shot(call: tuple, make: Callable[[], AbsolutePositions]) -> None:
    """Rows of different lengths, padding on either side and in between, some calls empty or all padding."""
    real, cuts, (batch, length) = call
    module, layer = make(), attention()
    x = tokens(batch, length, WIDTH)
    mask = None if real is None else torch.tensor(real)
    if mask is not None:
        # What padding holds has no influence.
        x = x.masked_fill(~mask.unsqueeze(-1), math.nan)
    positioned, attended = [], []
    with torch.no_grad():
        for begin, end in pairwise(cuts):
            chunk, own = x[:, begin:end], None if mask is None else mask[:, begin:end]
            step = layer.plan(chunk, attention_mask=own)
            positioned.append(module(chunk, step))
            attended.append(layer(positioned[-1], step=step))
        layer.use_kv_cache = False
        step = layer.plan(x, attention_mask=mask)
        whole = module(x, step)
        shot = layer(whole, step=step)
    wanted = expected(module, x, real or [[True] * length] * batch)
    torch.testing.assert_close(whole, wanted, atol=1e-9, rtol=0, equal_nan=True)
    assert torch.equal(torch.cat(positioned, 1).nan_to_num(7.0), whole.nan_to_num(7.0))
    assert_same(torch.cat(attended, 1), shot)


@pytest.mark.parametrize("spans", [[(0, 5), (0, 3)], [(0, 5), (2, 3)], [(1, 2), (3, 1)], [(0, 0), (4, 1)]])
def test_padding_on_either_side_gets_nothing(module: AbsolutePositions, spans: list[tuple[int, int]]) -> None:
    mask, layer = padding(spans, 5), attention()
    x = tokens(2, 5, WIDTH)
    for _ in range(2):
        step = layer.plan(x, attention_mask=mask)
        with torch.no_grad():
            total = module(x, step)
            layer(total, step=step)
        assert torch.equal(total[~mask], x[~mask])
        assert total.dtype == x.dtype
    for row, (start, count) in enumerate(spans):
        for i in range(count):  # the second call went on where the first one ended
            wanted = torch.tensor(of(module, count + i), dtype=torch.float64)
            torch.testing.assert_close(total[row, start + i] - x[row, start + i], wanted, atol=1e-9, rtol=0)


def test_rows_far_apart(module: AbsolutePositions) -> None:
    """A decode step of ragged rows without a mask, and one in which a row gains nothing."""
    x = torch.zeros(3, 1, WIDTH, dtype=torch.float64)
    before = (30, 2, 17) if isinstance(module, LearnedPositions) else (FAR, 2, 5000)
    mask = torch.tensor([[True], [False], [True]])
    for step in (step_of(before, x), step_of(before, x, mask, (1, 0, 1))):
        total = module(x, step)
        for row, position in enumerate(before):
            silent = step.real is not None and row == 1
            wanted = [0.0] * WIDTH if silent else of(module, position)
            assert total[row, 0].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("before", [(0,), (5,), (5, 2)])
def test_a_call_of_padding_alone_gets_nothing(module: AbsolutePositions, before: tuple[int, ...]) -> None:
    x = tokens(2, 3, WIDTH)
    assert torch.equal(module(x, step_of(before, x, padding([(0, 0)] * 2, 3), (0,))), x)


@pytest.mark.parametrize(
    ("before", "new_lengths", "formed"),
    [
        ((0,), (8, 5, 6), 2048),  # one run for all rows, from the block that is kept
        ((2040, 2041, 2046), (8, 5, 6), 12),  # from position 2040 to 2051, over the edge of a block
        ((FAR, 2, 5000), (8, 5, 6), 24),  # rows far apart: their own tokens only
        ((FAR, 2, 5000), (8,), 24),
    ],
)
def test_what_is_formed_does_not_grow_with_the_distance_of_rows(
    before: tuple[int, ...], new_lengths: tuple[int, ...], formed: int
) -> None:
    module = SinusoidalPositions(WIDTH)
    x = torch.zeros(3, 8, WIDTH)
    mask = None if len(new_lengths) == 1 else padding([(0, count) for count in new_lengths], 8)
    step = step_of(before, x, mask, new_lengths)
    with Sines() as sines:
        total = module(x, step)
    assert sines.formed == [formed * WIDTH // 2]
    for row in range(3):
        last = before[row % len(before)] + new_lengths[row % len(new_lengths)] - 1
        token = total[row, new_lengths[row % len(new_lengths)] - 1]
        assert token.tolist() == pytest.approx(sinusoid(last, WIDTH), abs=1e-6)


@pytest.mark.parametrize("moved", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [64, 7])
def test_sinusoids_hold_far_out(width: int, dtype: torch.dtype, moved: torch.dtype | None) -> None:
    """To 1e-6 at position 4,000,000, at the edges of blocks and over them, also after a cast."""
    module = SinusoidalPositions(width).to(moved)
    x = torch.zeros(1, 3, width, dtype=dtype)
    for first in (0, 2046, 4096, FAR - 1):
        total = module(x, step_of((first,), x))
        assert total.dtype == dtype
        for i in range(3):
            wanted = sinusoid(first + i, width)
            assert total[0, i].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ragged", [False, True])
def test_sixteen_bits_round_once(dtype: torch.dtype, ragged: bool) -> None:
    module = SinusoidalPositions(WIDTH).to(dtype)
    x = tokens(2, 3, WIDTH, dtype=dtype)
    before = (5, FAR) if ragged else (FAR,)
    total = module(x, step_of(before, x))
    added = torch.tensor([[sinusoid(first + i, WIDTH) for i in range(3)] for first in (before[0], FAR)])
    assert total.dtype == dtype
    # Not more than half a step between 16-bit numbers, and float32's own.
    half_a_step = torch.finfo(dtype).eps / 2 * (x.double() + added).abs()
    assert ((total.double() - x.double() - added).abs() <= half_a_step + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinusoids_at_given_positions(dtype: torch.dtype) -> None:
    """Eager and compiled; positions of one row may serve all rows."""
    sinusoids, x = SinusoidalPositions(WIDTH), torch.randn(2, 3, WIDTH, dtype=dtype)
    positions = torch.tensor([[0, 1, 2], [900, 5, 4_000_000]])
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    added = torch.tensor([[sinusoid(int(each), WIDTH) for each in row] for row in positions], dtype=torch.float64)
    compiled = torch.compile(sinusoids.add_at, backend="eager", fullgraph=True)
    for add in (sinusoids.add_at, compiled):
        torch.testing.assert_close(add(x, positions), (x.to(wide) + added.to(wide)).to(dtype))
        torch.testing.assert_close(add(x, positions[:1]), (x.to(wide) + added[:1].to(wide)).to(dtype))


def test_learned_in_sixteen_bits_and_under_autocast() -> None:
    module = learned().to(torch.bfloat16)
    x = tokens(1, 3, WIDTH, dtype=torch.bfloat16)
    total = module(x, step_of((0,), x))
    assert torch.equal(total, x + module.embedding.weight[:3])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = learned().float()(x, step_of((0,), x))
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, total, atol=0.05, rtol=0)


def test_each_position_learns_from_its_own_tokens() -> None:
    module = learned(max_length=4)
    mask = padding([(0, 3), (1, 2)], 3)
    x = tokens(2, 3, WIDTH).requires_grad_()
    total = module(x, attention().plan(x, attention_mask=mask))
    total.sum().backward()
    assert module.embedding.weight.grad[:, 0].tolist() == [2.0, 2.0, 1.0, 0.0]
    assert x.grad.unique().tolist() == [1.0]


def test_sinusoids_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        module = SinusoidalPositions(WIDTH)
        module(torch.zeros(1, 2, WIDTH), step_of((0,), torch.zeros(1, 2, WIDTH)))
    x = tokens(1, 2, WIDTH, dtype=torch.float32).requires_grad_()
    (module(x, step_of((0,), x)) ** 2).sum().backward()
    assert x.grad.isfinite().all()


def test_nothing_waits_for_the_device() -> None:
    """Tensors on the meta device have no values: reading one would fail."""
    x = torch.zeros(2, 2, WIDTH, device="meta")
    mask = torch.ones(2, 2, dtype=torch.bool, device="meta")
    for module in (learned().float().to("meta"), SinusoidalPositions(WIDTH)):
        for step in (
            step_of((3,), x),
            step_of((3, 30), x),
            step_of((3, 4), x, mask, (2, 1)),
            step_of((3,), x, mask, (1,)),
        ):
            total = module(x, step)
            assert total.shape == x.shape
            assert total.device == x.device


def test_state() -> None:
    sinusoidal, embedding = SinusoidalPositions(WIDTH), learned()
    assert not sinusoidal.state_dict()
    assert not list(sinusoidal.parameters())
    assert list(embedding.state_dict()) == ["embedding.weight"]
    assert repr(sinusoidal) == f"SinusoidalPositions(embed_dim={WIDTH}, base=10000.0, interleaved=True)"
    assert f"(max_length=40, embed_dim={WIDTH}" in repr(embedding).replace("\n  ", "")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_adds_the_same(module: AbsolutePositions, copied: Callable) -> None:
    x = tokens(2, 3, WIDTH)
    before = module(x, step_of((4,), x))
    assert torch.equal(copied(module)(x, step_of((4,), x)), before)
