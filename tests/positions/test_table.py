"""Table in blocks: the formula's numbers at any position, computed once per block, and not copied."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from transformer.positions.table import BLOCK, BLOCKS_KEPT, BlockTable

CPU = torch.device("cpu")


@dataclass
class Halves:
    """A formula that notes how many positions it was asked for, call by call."""

    asked: list[int] = field(default_factory=list)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append(positions.numel())
        assert positions.dtype == torch.float64
        return positions.unsqueeze(-1) / 2, -positions.unsqueeze(-1)


@example([(BLOCK - 1, 1), (BLOCK - 1, 2), (BLOCK, 1), (0, BLOCK), (0, BLOCK + 1)])
@given(st.lists(st.tuples(st.integers(0, 4 * BLOCK), st.integers(0, BLOCK + 3)), min_size=1, max_size=6))
def test_runs_anywhere(runs: list[tuple[int, int]]) -> None:
    table, formula = BlockTable(), Halves()
    for start, count in runs:
        half, minus = table.rows(formula, range(start, start + count), torch.float64, CPU)
        run = torch.arange(start, start + count, dtype=torch.float64).unsqueeze(-1)
        assert torch.equal(half, run / 2)
        assert torch.equal(minus, -run)


def test_positions_of_any_shape() -> None:
    positions = torch.tensor([[[7, 4_000_000], [0, 3]]])
    half, _ = BlockTable().rows(Halves(), positions, torch.float32, CPU)
    assert half.dtype == torch.float32
    assert half.tolist() == [[[[3.5], [2_000_000.0]], [[0.0], [1.5]]]]


def test_steps_inside_a_block_work_out_nothing() -> None:
    table, formula = BlockTable(), Halves()
    for position in range(BLOCK - 3, BLOCK + 3):
        table.rows(formula, range(position, position + 1), torch.float32, CPU)
    assert formula.asked == [BLOCK, BLOCK]
    table.rows(formula, range(5), torch.float64, CPU)
    assert formula.asked == [BLOCK] * 3, "each dtype has its own"


def test_the_blocks_used_last_stay() -> None:
    table, formula = BlockTable(), Halves()

    def use(block: int) -> int:
        """The number of blocks that a call computed."""
        before = len(formula.asked)
        table.rows(formula, range(block * BLOCK, block * BLOCK + 1), torch.float32, CPU)
        return len(formula.asked) - before

    assert [use(block) for block in range(BLOCKS_KEPT)] == [1] * BLOCKS_KEPT
    assert [use(block) for block in range(BLOCKS_KEPT)] == [0] * BLOCKS_KEPT
    assert use(0) == 0
    assert use(BLOCKS_KEPT) == 1
    assert use(0) == 0, "used just before, so it is not the oldest"
    assert use(1) == 1, "the one used least recently went"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_carries_no_blocks(copied: object) -> None:
    table, formula = BlockTable(), Halves()
    table.rows(formula, range(3), torch.float32, CPU)
    assert len(pickle.dumps(table)) < BLOCK
    copied(table).rows(formula, range(3), torch.float32, CPU)
    assert formula.asked == [BLOCK] * 2
    table.rows(formula, range(3), torch.float32, CPU)
    assert formula.asked == [BLOCK] * 2, "the original still has its own"


def test_rows_made_in_inference_mode_serve_training() -> None:
    table, formula = BlockTable(), Halves()
    with torch.inference_mode():
        table.rows(formula, range(2), torch.float32, CPU)
    half, _ = table.rows(formula, range(2), torch.float32, CPU)
    x = torch.ones(2, 1, requires_grad=True)
    (x * half).sum().backward()
    assert x.grad.tolist() == [[0.0], [0.5]]
