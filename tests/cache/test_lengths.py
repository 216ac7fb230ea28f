"""Lengths: one number for each row, a single one where all are equal; operators work row by row."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import transformer.cache
from transformer.cache import EMPTY, Lengths

LENGTHS = st.lists(st.integers(-5, 5), min_size=3, max_size=3).map(Lengths.of)
OPERATIONS: list[tuple[Callable[[Lengths, object], Lengths], Callable[[int, int], int]]] = [
    (lambda one, other: one + other, lambda a, b: a + b),
    (lambda one, other: one - other, lambda a, b: a - b),
    (lambda one, other: other + one, lambda a, b: b + a),
    (lambda one, other: other - one, lambda a, b: b - a),
    (lambda one, other: one.maximum(other), max),
    (lambda one, other: one.minimum(other), min),
]


def test_equal_numbers_take_a_single_entry() -> None:
    assert Lengths.of([4, 4, 4]) == (4,)
    assert Lengths.of([4, 5, 4]) == (4, 5, 4)
    assert Lengths.of([]) == ()
    assert type(Lengths.of([4, 4])) is type(Lengths.of([4, 5])) is Lengths
    assert EMPTY == (0,)


def test_uniform_says_whether_one_number_stands_for_all_rows() -> None:
    assert Lengths((4,)).uniform
    assert not Lengths((4, 5)).uniform
    assert not Lengths.of([]).uniform, "no rows, no number"


def test_expand_gives_an_entry_for_each_row() -> None:
    assert Lengths((4,)).expand(3) == (4, 4, 4)
    assert Lengths((4, 5)).expand(2) == (4, 5)
    assert type(Lengths((4,)).expand(3)) is Lengths


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(OPERATIONS)))
@pytest.mark.parametrize("operand", ["lengths", "tuple", "int"])
@given(first=LENGTHS, second=LENGTHS)
def test_operations_work_row_by_row(number: int, operand: str, first: Lengths, second: Lengths) -> None:
    operation, of_numbers = OPERATIONS[number]
    if operand == "int":
        second = Lengths(second[:1])
    other = {"lengths": second, "tuple": tuple(second), "int": second[0]}[operand]
    expected = [of_numbers(a, b) for a, b in zip(first.expand(3), second.expand(3), strict=True)]
    result = operation(first, other)
    assert result == Lengths.of(expected)
    assert type(result) is Lengths


def test_lengths_of_different_batches_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="got 3"):
        Lengths((1, 2)).maximum((1, 2, 3))


def test_a_tuple_for_everybody_else() -> None:
    lengths = Lengths((5, 2))
    assert lengths == (5, 2)
    assert {lengths: 1}[(5, 2)] == 1
    assert (max(lengths), min(lengths), list(lengths), lengths[0]) == (5, 2, [5, 2], 5)
    for copied in (copy.deepcopy(lengths), pickle.loads(pickle.dumps(lengths))):
        assert copied == lengths
        assert type(copied) is Lengths
    with pytest.raises((AttributeError, TypeError)):
        lengths.more = 1  # type: ignore[attr-defined]


def test_column() -> None:
    assert Lengths((1, 2)).column().tolist() == [[1], [2]]
    assert Lengths((3,)).column(torch.device("cpu")).tolist() == [[3]]
    assert Lengths((3,)).column().dtype == torch.int64


def test_the_old_name_still_answers() -> None:
    with pytest.warns(DeprecationWarning, match="Lengths"):
        assert transformer.cache.Rows is Lengths
