"""Decode step of the kernel alone over keys and values stored by a codec, beside the same over float32."""

from collections.abc import Iterator
from functools import partial
from itertools import product

from torch import Tensor

from transformer.codecs import Coding
from transformer.kernels import attend_few

from .case import Candidate, Case, Setup
from .chunks import flops
from .grid import Grid
from .limits import arithmetic, reading

KIND = "One decode step of the kernel over coded keys"
SINGLE = "ours, float32"
ERROR = "largest difference to decoded keys"
CODECS = "int8", "int4", "float8_e4m3fn", "bfloat16"


def cases(grid: Grid) -> Iterator[Case]:
    """Key/value heads that are several: of one head the products take the time."""
    if not grid.on_cpu:
        return
    for codec, batch, cached, groups in product(CODECS, grid.batches, grid.cached, grid.groups):
        if groups > 1:
            point = {"codec": codec, "batch": batch, "cached": cached, "G": groups}
            weight = 0.8 + batch * cached * groups / (1 << 22)
            yield Case(KIND, point, partial(setup, grid, codec, batch, cached, groups), weight)


def setup(grid: Grid, codec: str, batch: int, cached: int, groups: int) -> Setup:
    """One query of each row and head."""
    place, scale = grid.place("float32"), grid.head_dim**-0.5
    coding = Coding.of((codec, codec), grid.head_dim, place.dtype)
    query = place.random(batch, grid.num_heads, 1, grid.head_dim)
    key, value = (place.filled(batch, groups, cached, grid.head_dim) for _ in range(2))
    stored = coding.encoded(key, value)

    def over_records() -> Tensor:
        return attend_few(query, *stored, scale, coding=coding)

    def details() -> dict[str, float]:
        wanted = attend_few(query, *coding.decoded(*stored), scale)
        return {ERROR: float((over_records() - wanted).abs().max() / wanted.abs().max())}

    products = flops(grid, groups, 0, batch * cached)
    return Setup(
        Candidate(over_records),
        others={SINGLE: Candidate(lambda: attend_few(query, key, value, scale))},
        limits=[reading(stored), arithmetic(products, place)],
        details=details,
    )
