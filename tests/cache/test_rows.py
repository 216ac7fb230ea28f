"""Numbers of rows: one entry stands for rows that are all alike."""

from hypothesis import given
from hypothesis import strategies as st

from transformer.cache import rows

NUMBERS = st.lists(st.integers(-5, 5), min_size=3, max_size=3).map(rows.alike)


def test_alike() -> None:
    assert rows.alike([4, 4, 4]) == (4,)
    assert rows.alike([4, 5, 4]) == (4, 5, 4)
    assert rows.alike([]) == ()
    assert rows.spread((4,), 3) == (4, 4, 4)


@given(NUMBERS, NUMBERS)
def test_row_by_row(first: rows.Rows, second: rows.Rows) -> None:
    pairs = list(zip(rows.spread(first, 3), rows.spread(second, 3), strict=True))
    for function, expected in (
        (rows.plus, [a + b for a, b in pairs]),
        (rows.minus, [a - b for a, b in pairs]),
        (rows.at_least, [max(pair) for pair in pairs]),
        (rows.at_most, [min(pair) for pair in pairs]),
    ):
        result = function(first, second)
        assert rows.spread(result, 3) == tuple(expected)
        assert result == rows.alike(expected)


def test_column() -> None:
    assert rows.column((1, 2)).tolist() == [[1], [2]]
    assert rows.column((3,)).tolist() == [[3]]
