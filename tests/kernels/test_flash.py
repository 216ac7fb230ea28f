"""Plans of flash attention on a GPU: what its operator is told, read back in plain loops, shows what the rule shows.

The operator itself runs on a card alone: `tests/integration/test_devices.py`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer.errors import ArgumentError
from transformer.kernels import Backend, Kernel, Positions, backend
from transformer.kernels.flash import FlashCall, flash_call, is_served

GROUPS, HEADS, WIDTH = 2, 4, 8


def once(_: Any, make: Any) -> Any:
    return make()


def heads(batch: int, length: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as projections lay them out, and keys and values in a buffer with room for more."""
    query = torch.randn(batch, length, HEADS, WIDTH).transpose(1, 2)
    room = torch.randn(2, batch, GROUPS, columns + 3, WIDTH)
    return query, room[0, :, :, :columns], room[1, :, :, :columns]


def attended(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """One query [H, D] over keys and values [S, G, D], of which `visible` bool [S] are seen: float64 [H, D]."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(query.shape[0]) if visible.any() else ():
        group = head * key.shape[1] // query.shape[0]
        scores = (key[visible, group].double() @ query[head].double()) * 0.3
        out[head] = scores.softmax(0) @ value[visible, group].double()
    return out


def read_back(call: FlashCall) -> list[Tensor]:
    """What the operator documents of its arguments, in loops: for each row float64 [L, H, D]."""
    rows = call.rows
    if rows is None:
        parts = [(call.query[row], call.key[row], call.value[row]) for row in range(call.query.shape[0])]
    else:
        parts = []
        for row, used in enumerate(rows.used.tolist()):
            begin, end = rows.queries[row : row + 2].tolist()
            low, high = rows.keys[row : row + 2].tolist()
            assert low + used <= high
            assert used <= call.longest_key
            assert end - begin <= call.longest_query
            parts.append((call.query[begin:end], call.key[low : low + used], call.value[low : low + used]))
    outs = []
    for query, key, value in parts:
        place, column = key.shape[0] - query.shape[0], torch.arange(key.shape[0])
        out = []
        for at, one in enumerate(query, place):
            seen = torch.ones(key.shape[0], dtype=torch.bool)
            if call.causal:
                seen &= column <= at
            if call.left >= 0:
                seen &= column >= at - call.left
            if call.right >= 0:
                seen &= column <= at + call.right
            out.append(attended(one, key, value, seen))
        outs.append(torch.stack(out) if out else query.double())
    return outs


def by_rule(query: Tensor, key: Tensor, value: Tensor, positions: Positions) -> Tensor:
    """The rule, query by query: float64 [B, L, H, D]."""
    batch, _, length, _ = query.shape
    spread = [each if len(each) == batch else each * batch for each in map(tuple, positions[:4])]
    outs = torch.zeros(batch, length, HEADS, WIDTH, dtype=torch.float64)
    for row, (first, start, end, past) in enumerate(zip(*spread, strict=True)):
        for number in range(length):
            at = past + number
            where = torch.arange(first, first + key.shape[2])
            seen = (where >= start) & (where < end)
            if positions.causal:
                seen &= where <= at
            if positions.window is not None:
                seen &= (where - at).abs() < positions.window
            outs[row, number] = attended(
                query[row, :, number], key[row].transpose(0, 1), value[row].transpose(0, 1), seen
            )
    return outs


UNIFORM = [  # first, start, end, past, length, columns
    (0, 0, 5, 0, 5, 5),
    (0, 0, 9, 6, 3, 9),
    (0, 0, 9, 8, 1, 9),
    (4, 6, 12, 10, 2, 8),
    (4, 4, 12, 11, 1, 8),
]
RAGGED = [  # first, start, end and past of each row; length and columns
    ((0,), (0,), (5, 2, 4), (0,), 5, 5),
    ((0,), (0,), (9, 6, 4), (8, 5, 3), 1, 9),
    ((0,), (0,), (8, 5, 3), (6, 3, 1), 2, 8),
    ((2, 0, 1), (3, 0, 2), (9, 6, 4), (8, 5, 3), 1, 7),
    ((2, 0, 1), (3, 0, 2), (9, 5, 4), (7, 4, 2), 2, 7),
    ((0,), (0,), (6, 4, 3), (4, 4, 2), 2, 6),  # a row without a new token
    ((0,), (0, 2, 0), (3, 2, 1), (2, 2, 0), 1, 4),  # and one without any key before it
]


@pytest.mark.parametrize(("causal", "window"), list(itertools.product((True, False), (None, 1, 3, 20))))
@pytest.mark.parametrize("case", UNIFORM + RAGGED, ids=str)
def test_what_the_operator_is_told(case: tuple[Any, ...], causal: bool, window: int | None) -> None:
    """Every query of a real token sees what the rule shows it, and nothing else."""
    torch.manual_seed(0)
    *numbers, length, columns = case
    numbers = [each if isinstance(each, tuple) else (each,) for each in numbers]
    positions = Positions(*numbers, causal, window)
    batch = max(map(len, numbers)) if max(map(len, numbers)) > 1 else 2
    query, key, value = heads(batch, length, columns)
    call = flash_call(query, key, value, positions, once)
    ends = [end - past for end, past in zip(spread(numbers[2], batch), spread(numbers[3], batch), strict=True)]
    if not causal and window is not None and any(new != length for new in ends):
        assert call is None, "a window of both sides would take padding for tokens"
        return
    assert call is not None
    found, right = read_back(call), by_rule(query, key, value, positions)
    for row, new in enumerate(ends):
        torch.testing.assert_close(found[row][:new], right[row, :new], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("causal", "window"), list(itertools.product((True, False), (None, 1, 3, 20))))
@pytest.mark.parametrize("case", UNIFORM + RAGGED, ids=str)
def test_flat_queries(case: tuple[Any, ...], causal: bool, window: int | None) -> None:
    """The same without padding between the queries of rows: a window of both sides too, and no bound by the columns."""
    torch.manual_seed(0)
    *numbers, length, columns = case
    numbers = [each if isinstance(each, tuple) else (each,) for each in numbers]
    positions = Positions(*numbers, causal, window)
    batch = max(map(len, numbers)) if max(map(len, numbers)) > 1 else 2
    query, key, value = heads(batch, length, columns)
    ends, pasts = spread(numbers[2], batch), spread(numbers[3], batch)
    lengths = [end - past for end, past in zip(ends, pasts, strict=True)]
    flat = torch.cat([query[row, :, :new] for row, new in enumerate(lengths)], 1).unsqueeze(0)
    call = flash_call(flat, key, value, positions, once, lengths)
    if max(lengths) == 1 and 0 in lengths:
        assert call is None, "the operator would give every row a query"
        return
    assert call is not None
    assert call.query.shape == (sum(lengths), HEADS, WIDTH)
    right = by_rule(query, key, value, positions)
    for row, found in enumerate(read_back(call)):
        torch.testing.assert_close(found, right[row, : lengths[row]], rtol=0, atol=1e-12)


def spread(numbers: tuple[int, ...], batch: int) -> tuple[int, ...]:
    return numbers if len(numbers) == batch else numbers * batch


def test_nothing_is_copied() -> None:
    query, key, value = heads(3, 1, 9)
    for end, past in (((9,), (8,)), ((9, 6, 4), (8, 5, 3))):
        call = flash_call(query, key, value, Positions((0,), (0,), end, past), once)
        assert call is not None
        for ours, given in ((call.query, query), (call.key, key), (call.value, value)):
            assert ours.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def test_what_needs_a_mask() -> None:
    """Padding beyond the columns (not flat), keys after the queries, and rows at no whole number of tokens."""
    query, key, value = heads(2, 2, 6)
    assert flash_call(query, key, value, Positions((0,), (0,), (6, 4), (5, 2)), once) is None
    assert flash_call(query, key, value, Positions((0,), (0,), (6, 4), (5, 2)), once, (1, 2)) is not None
    assert flash_call(query, key, value, Positions((0,), (0,), (6,), (3,)), once) is None
    odd = torch.randn(2 * GROUPS * 6 * WIDTH + 3).as_strided((2, GROUPS, 6, WIDTH), (6 * WIDTH * GROUPS + 3, 48, 8, 1))
    assert flash_call(query, odd, value, Positions((0,), (0,), (6, 4), (4, 2)), once) is None


def test_only_on_a_gpu() -> None:
    query, key, value = (x.bfloat16() for x in heads(1, 1, 4))
    with torch.inference_mode():
        assert not is_served(query, key, value)
        with backend(Backend.FLASH), pytest.raises(ArgumentError, match="needs an NVIDIA GPU"):
            Kernel(0.3)(query, key, value)
