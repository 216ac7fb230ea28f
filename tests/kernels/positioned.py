"""Attention by positions in plain loops over float64, and inputs of the kernel that it is compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from transformer.kernels import tuned
from transformer.kernels.position_inputs import PositionedSinks, Positions


@contextmanager
def in_parts(threads: int) -> Iterator[int]:
    """Inference with so many threads, each with chunks of its own also where the keys are few."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tuned(min_parallel_bytes=0, min_part_keys=1), torch.no_grad():
            yield threads
    finally:
        torch.set_num_threads(before)


def inputs(
    batch: int, heads: int, groups: int, length: int, keys: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as projections give them, and keys and values as parts of buffers with NaN in every other slot."""
    torch.manual_seed(0)
    query = torch.randn(batch, length, heads, head_dim).to(dtype).transpose(1, 2)
    buffers = torch.full((2, batch, groups, keys + 7, head_dim), math.nan)
    buffers[:, :, :, 3 : keys + 3] = torch.randn(2, batch, groups, keys, head_dim)
    key, value = buffers.to(dtype)[:, :, :, 3 : keys + 3]
    return query, key, value


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    positions: Positions,
    *,
    softcap: float | None = None,
    sinks: PositionedSinks | None = None,
    slope: Tensor | None = None,
    number: dict[int, float] | None = None,
) -> Tensor:
    """Plain loops over rows, heads, queries and the positions that each sees; `number` per distance, for head 0 on."""
    batch, heads, length, _ = query.shape
    per_group = heads // key.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)

    def of(numbers: tuple[int, ...], row: int) -> int:
        return numbers[row] if len(numbers) > 1 else numbers[0]

    for row, head, token in itertools.product(range(batch), range(heads), range(length)):
        first, start, end, past = (of(each, row) for each in positions[:4])
        at, group, seen = past + token, head // per_group, []
        low = max(start, at - positions.window + 1) if positions.window else start
        if sinks is not None:
            near = min(at, sinks.max_distance)
            of_sinks = sinks.query[row, head, token], sinks.key[row, group]
            seen = [(of_sinks[0], of_sinks[1][sink], near - sink) for sink in range(min(sinks.key.shape[2], low))]
        values = [] if sinks is None else [sinks.value[row, group, sink] for sink in range(len(seen))]
        for place in range(low, end):
            ahead = place - at
            if (positions.causal and ahead > 0) or (positions.window and ahead >= positions.window):
                continue
            seen.append((query[row, head, token], key[row, group, place - first], at - place))
            values.append(value[row, group, place - first])
        if not seen:
            continue
        scores = torch.stack([q.double() @ k.double() * scale for q, k, _ in seen])
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        distances = [distance for *_, distance in seen]
        if slope is not None:
            scores += slope[head].double() * torch.tensor(distances).abs()
        if number is not None:
            scores += torch.tensor([number[distance] * (head + 1) for distance in distances], dtype=torch.float64)
        out[row, head, token] = torch.softmax(scores, 0) @ torch.stack(values).double()
    return out


def check(found: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """float32 within 1e-6 of the largest number; 16 bits rounded once, from sums in float32."""
    step = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert found.dtype is dtype
    assert (found.double() - right).abs().max() <= step * right.abs().max()
