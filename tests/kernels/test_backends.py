"""Every backend against the reference in float64, on both sides of every threshold, in four dtypes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from transformer.errors import ArgumentError
from transformer.kernels import Backend, Kernel, Sinks, backend, tuned
from transformer.kernels.compiled.switch import are_available
from transformer.kernels.inputs import AttentionInputs
from transformer.kernels.reference import reference_attention
from transformer.kernels.tuning import DEFAULT

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
OTHERS = [each for each in Backend if each is not Backend.REFERENCE]


class Sizes(NamedTuple):
    batch: int
    heads: int
    groups: int
    length: int
    keys: int


def around(threshold: int) -> tuple[int, int, int]:
    return threshold - 1, threshold, threshold + 1


THRESHOLDS: dict[str, list[Sizes]] = {
    "max_matmul_rows": [Sizes(1, 2, 2, rows, DEFAULT.min_matmul_keys) for rows in around(DEFAULT.max_matmul_rows)],
    "min_matmul_keys": [Sizes(2, 4, 2, 3, keys) for keys in around(DEFAULT.min_matmul_keys)],
    "min_half_matmul_keys": [Sizes(1, 2, 2, 1, keys) for keys in around(DEFAULT.min_half_matmul_keys // 2)],
    "upcast_keys": [Sizes(1, 2, 2, 2, keys) for keys in around(DEFAULT.upcast_keys)],
    "min_onednn_keys": [Sizes(1, 3, 1, 1, keys) for keys in around(DEFAULT.min_onednn_keys)],
    "split_kv_heads": [Sizes(1, 4, groups, 1, DEFAULT.min_split_keys) for groups in (1, 2, 4)]
    + [Sizes(3, 2, 1, 1, DEFAULT.min_split_keys)],
    "split_kv_parts": [Sizes(1, 6, 3, 1, DEFAULT.min_split_keys + rest) for rest in range(DEFAULT.split_kv_parts)],
    "min_split_keys": [Sizes(1, 4, 1, 1, keys) for keys in around(DEFAULT.min_split_keys)],
    "max_matmul_rows_over_long_keys": [
        Sizes(1, heads, 1, 1, DEFAULT.min_onednn_keys) for heads in around(DEFAULT.max_matmul_rows_over_long_keys)
    ],
    "min_shared_head_keys": [Sizes(1, 4, 1, 1, keys) for keys in around(DEFAULT.min_shared_head_keys)],
    "min_prefix": [Sizes(2, 4, 2, 40, 40 + prefix) for prefix in around(DEFAULT.min_prefix)],
    "max_compiled_query_rows": [Sizes(1, 2, 2, rows, 300) for rows in around(DEFAULT.max_compiled_query_rows)],
    "min_part_keys": [Sizes(1, 4, 1, 1, keys) for keys in around(DEFAULT.min_part_keys)],
    "half_causal_rows": [
        Sizes(1, 1, 1, length, DEFAULT.min_prefix + length) for length in around(DEFAULT.half_causal_rows)
    ],
}
CASES = [(name, sizes) for name, each in THRESHOLDS.items() for sizes in each]


@lru_cache(maxsize=4)
def inputs(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """float64 queries, and keys and values in a buffer with room for more; the largest score is the last key's."""
    batch, heads, groups, length, keys = sizes
    torch.manual_seed(0)
    query = torch.randn(batch, heads, length, 8, dtype=torch.float64)
    room = torch.randn(2, batch, groups, keys + 3, 8, dtype=torch.float64)
    room[0, :, :, keys - 1] = 2.0 * query[:, :1, -1]
    return query, room[0, :, :, :keys], room[1, :, :, :keys]


def cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=lambda value: value if isinstance(value, str) else str(value[:]))
@torch.no_grad()
def test_at_every_threshold(name: str, sizes: Sizes, dtype: torch.dtype) -> None:
    """Each backend that serves the call, and the one that the table chooses: queries that end their keys."""
    given = cast(inputs(sizes), dtype)
    causal = sizes.length > 1
    exact, _ = reference_attention(AttentionInputs(*(x.double() for x in given)), 0.3, causal=causal)
    served = []
    for asked in (None, *Backend):
        with backend(asked):
            try:
                out, weights = Kernel(0.3)(*given, causal=causal)
            except ArgumentError:
                continue
        served.append(asked)
        assert weights is None
        assert out.dtype is dtype
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=TOLERANCE[dtype])
    assert {None, Backend.REFERENCE, Backend.SDPA, Backend.MATMUL} <= set(served)
    assert (Backend.SPLIT_KV in served) == (sizes.length == 1 and dtype in (torch.float32, torch.float64))
    assert (Backend.PREFIX_MERGE in served) == (1 < sizes.length < sizes.keys)
    rows = sizes.heads // sizes.groups * sizes.length
    compiled = are_available() and dtype is not torch.float64 and rows <= DEFAULT.max_compiled_query_rows
    assert (Backend.COMPILED in served) == compiled


def test_every_size_that_chooses_a_backend_has_a_case() -> None:
    """The rest are of tiles, threads, another processor or device, and choices before or in a backend."""
    others = {"tile_bytes", "min_split_threads", "min_parallel_bytes", "max_norm_rows"}
    others |= {"max_compiled_query_rows_beside_amx", "min_row_tokens", "max_upcast_keys", "max_upcast_head_dim"}
    others |= {"min_cudnn_queries", "min_shared_bytes", "max_emulated_rows"}
    of_projections = {name for name in vars(DEFAULT) if "linear" in name or "sliced" in name or "few_rows" in name}
    assert set(THRESHOLDS) == vars(DEFAULT).keys() - others - of_projections


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"causal": True},
    "bias": {"bias": True},
    "causal and bias": {"causal": True, "bias": True},
    "sinks": {"sinks": True},
    "sinks and bias": {"sinks": True, "bias": True},
    "weights": {"return_weights": True},
    "all": {"causal": True, "bias": True, "sinks": True, "return_weights": True},
}
SERVED = {
    Backend.SDPA: {"plain", "causal", "bias", "causal and bias"},
    Backend.MATMUL: set(OPTIONS),
    Backend.SPLIT_KV: {"plain", "causal"},
    Backend.PREFIX_MERGE: {"causal"},
    Backend.COMPILED: {"plain", "causal"} if are_available() else set(),
    Backend.FLASH: set(),  # of a GPU alone
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("asked", OTHERS, ids=lambda each: each.value)
@torch.no_grad()
def test_options(asked: Backend, options: str, softcap: float | None, groups: int, dtype: torch.dtype) -> None:
    """Three queries, or one, that end nine keys, with two sinks: the same result, or a refusal."""
    length = 1 if asked is Backend.SPLIT_KV else 3
    query, key, value = cast(inputs(Sizes(2, 4, groups, length, 9)), dtype)
    given = dict(OPTIONS[options])
    bias = sinks = None
    if given.pop("bias", False):
        bias = torch.randn(2, 1, length, 9).masked_fill(torch.arange(9) == 4, -torch.inf)
    if given.pop("sinks", False):
        sinks = Sinks(query.flip(-1), key[:, :, :2], value[:, :, :2], None if bias is None else bias[..., :2])
    kernel = Kernel(0.3, softcap)
    served = options in SERVED[asked] and (softcap is None or asked in (Backend.MATMUL, Backend.COMPILED))
    half = dtype in (torch.float16, torch.bfloat16)
    if not served or (asked is Backend.SPLIT_KV and half) or (asked is Backend.COMPILED and dtype is torch.float64):
        with backend(asked), pytest.raises(ArgumentError, match=f"{asked.value!r} cannot serve this call: it "):
            kernel(query, key, value, bias, sinks=sinks, **given)
        return
    with backend(asked):
        found = kernel(query, key, value, bias, sinks=sinks, **given)
    with backend(Backend.REFERENCE):
        wide = Sinks(*(None if x is None else x.double() for x in sinks)) if sinks is not None else None
        wide_bias = None if bias is None else bias.double()
        exact = kernel(query.double(), key.double(), value.double(), wide_bias, sinks=wide, **given)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("asked", [Backend.SDPA, Backend.MATMUL], ids=lambda each: each.value)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(asked: Backend, causal: bool) -> None:
    given = [x.requires_grad_() for x in cast(inputs(Sizes(2, 4, 2, 3, 9)), torch.float64)]
    gradients = []
    for each in (asked, Backend.REFERENCE):
        with backend(each):
            gradients.append(torch.autograd.grad(Kernel(0.3)(*given, causal=causal)[0].square().sum(), given))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tile_bytes", [1, 4 * 9, DEFAULT.tile_bytes])
@torch.no_grad()
def test_sizes_of_tiles(tile_bytes: int) -> None:
    given = cast(inputs(Sizes(2, 4, 2, 1, 9)), torch.float64)
    exact, _ = reference_attention(AttentionInputs(*given), 0.3)
    with backend(Backend.MATMUL), tuned(tile_bytes=tile_bytes):
        torch.testing.assert_close(Kernel(0.3)(*given)[0], exact, rtol=0, atol=1e-12)
