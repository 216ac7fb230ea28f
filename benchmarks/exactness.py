"""Errors of one decode step of a module, against the same module in float64.

float32 beside the largest value of the result; 16 bits beside the error of SDPA in the same module; int8 weights beside
the module with the float numbers that they stand for.
"""

import copy
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from transformer import GroupQueryAttention

from .case import Candidate, Case, Setup
from .grid import DTYPES, Grid, Place
from .int8_weights import dequantised, quantised
from .layers import layer, sdpa

KIND = "Exactness of a decode step"
ERROR, OF_SDPA = "largest error / largest value", "the same of SDPA"
INT8 = "int8"
CACHED = 512


def cases(grid: Grid) -> Iterator[Case]:
    """All dtypes, with as many key/value heads as heads and with fewer, one row and several."""
    for dtype, groups, rows in product((*DTYPES, "float16", INT8), grid.groups, (1, 8)):
        point = {"dtype": dtype, "G": groups, "rows": rows}
        yield Case(KIND, point, partial(setup, grid, dtype, groups, rows), weight=0.2)


def setup(grid: Grid, dtype: str, groups: int, rows: int) -> Setup:
    """A step of every row after a prompt; the errors are among the details."""
    place = Place(grid.device, {**DTYPES, "float16": torch.float16, INT8: torch.float32}[dtype])
    attention = layer(grid, place, groups, use_kv_cache=True)
    tokens = place.random(rows, CACHED + 1, grid.embed_dim)
    exact = copy.deepcopy(attention)
    if dtype == INT8:
        quantised(attention)
        with torch.no_grad():
            for name, projection in attention.named_children():
                if isinstance(projection, nn.Linear):
                    exact.get_submodule(name).weight.copy_(dequantised(projection.weight))
    exact = exact.double()
    wanted = stepped(exact, tokens.double())
    step = stepped(attention, tokens)
    details = {ERROR: error(step, wanted)}
    if dtype not in ("float32", INT8):
        details[OF_SDPA] = error(by_sdpa(attention, tokens), wanted)
    cache = attention.kv_cache
    return Setup(
        Candidate(lambda: attention(tokens[:, -1:]), lambda: cache.truncate(CACHED + 1)), details=lambda: details
    )


@torch.inference_mode()
def stepped(attention: GroupQueryAttention, tokens: Tensor) -> Tensor:
    """The output of the last token, the others cached."""
    attention(tokens[:, :-1])
    return attention(tokens[:, -1:])


@torch.inference_mode()
def by_sdpa(attention: GroupQueryAttention, tokens: Tensor) -> Tensor:
    """The same by plain linears and SDPA over the keys and values of the cache."""
    query = attention.q_proj(tokens[:, -1:]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    rotary = attention.position
    query = rotary.rotate(query, rotary.table(range(CACHED, CACHED + 1), query))
    cache = attention.kv_cache
    out = sdpa(query, cache["key"][:, :, : CACHED + 1], cache["value"][:, :, : CACHED + 1], None, False)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a part of the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())
