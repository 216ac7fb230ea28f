"""Decode step of the kernel alone over int8 keys and values, quantised by hand, beside the same over float32."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from transformer.kernels.few_queries import Scales, attend_few

from .case import Candidate, Case, Setup
from .chunks import flops
from .grid import Grid
from .limits import arithmetic, reading

KIND = "One decode step of the kernel over int8 keys"
SINGLE = "ours, float32"
ERROR = "largest difference to dequantised keys"


def cases(grid: Grid) -> Iterator[Case]:
    """Key/value heads that are several: of one head the products take the time."""
    if not grid.on_cpu:
        return
    for batch, cached, groups in product(grid.batches, grid.cached, grid.groups):
        if groups > 1:
            point = {"batch": batch, "cached": cached, "G": groups}
            weight = 0.8 + batch * cached * groups / (1 << 22)
            yield Case(KIND, point, partial(setup, grid, batch, cached, groups), weight)


def setup(grid: Grid, batch: int, cached: int, groups: int) -> Setup:
    """One query of each row and head; a scale for each key and value."""
    place = grid.place("float32")
    query = place.random(batch, grid.num_heads, 1, grid.head_dim)
    key, value = (place.filled(batch, groups, cached, grid.head_dim) for _ in range(2))
    (int8_key, key_scale), (int8_value, value_scale) = quantised(key), quantised(value)
    scale, scales = grid.head_dim**-0.5, Scales(key_scale, value_scale)

    def over_int8() -> Tensor:
        return attend_few(query, int8_key, int8_value, scale, scales=scales)

    def details() -> dict[str, float]:
        exact = (stored.float() * by[..., None] for stored, by in ((int8_key, key_scale), (int8_value, value_scale)))
        wanted = attend_few(query, *exact, scale)
        return {ERROR: float((over_int8() - wanted).abs().max() / wanted.abs().max())}

    products = flops(grid, groups, 0, batch * cached)
    return Setup(
        Candidate(over_int8),
        others={SINGLE: Candidate(lambda: attend_few(query, key, value, scale))},
        limits=[reading([int8_key, int8_value, *scales]), arithmetic(products, place)],
        details=details,
    )


def quantised(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers and float32 scales [B, G, S], by the largest number of each vector."""
    scale = numbers.abs().amax(-1).clamp(min=1e-12) / 127
    return (numbers / scale[..., None]).round().to(torch.int8), scale
