"""Flash attention on a GPU without a mask: PyTorch's kernels, given where the tokens of each row begin and end.

SDPA takes cuDNN for 16-bit numbers on some cards, which compiles for each new number of keys, as every decode step has
one: 43 ms, once for all layers of a model (NVIDIA H200, PyTorch 2.11, 2026-11-28). FlashAttention-2, arXiv 2307.08691;
for one query the keys of equal rows are split, as in flash decoding.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tracing import is_plain_eager
from .biases import HALF_DTYPES
from .flash_rows import MAX_TOKENS, FlashRows, Once, RowsOf
from .position_inputs import Positions
from .private_operators import FLASH_ON_GPU

MAX_HEAD_DIM = 256


class FlashCall(NamedTuple):
    """A call of PyTorch's operator. A query sees the keys from `left` before its own place to `right` after it (-1: no
    bound); the last query of a row has the place of its last key."""

    query: Tensor
    """[B, L, H, D] or, with `rows`, [B * L, H, D]."""
    key: Tensor
    """[B, S, G, D] or, with `rows`, [N, G, D]."""
    value: Tensor
    longest_query: int
    longest_key: int
    causal: bool
    left: int = -1
    right: int = -1
    rows: FlashRows | None = None


def is_served(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels read these tensors: 16 bits on an NVIDIA GPU from compute capability 8.0 on, no gradients."""
    dtype, head_dim = query.dtype, query.shape[3]
    return (
        query.is_cuda
        and dtype in HALF_DTYPES
        and key.dtype is value.dtype is dtype
        and not torch.is_grad_enabled()
        and is_plain_eager(query)
        and head_dim == value.shape[3]
        and head_dim <= MAX_HEAD_DIM
        and head_dim % 8 == 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and key.shape[2] > 0
        and query.numel() > 0
        and FLASH_ON_GPU
        and _is_supported(query.get_device())
    )


@cache
def _is_supported(device: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False) -> Tensor:
    """Attention of `query` [B, H, L, D] over `key`, `value` [B, G, S, D]: [B, H, L, D].

    With `causal=True` the queries are the last of the keys.
    """
    length, keys = query.shape[2], key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    call = FlashCall(query, key, value, longest_query=length, longest_key=keys, causal=causal)
    return run(call, scale).transpose(1, 2)


def flash_by_positions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    positions: Positions,
    once: Once[Any],
    lengths: Sequence[int] | None = None,
) -> Tensor | None:
    """The same where `positions` say what a query sees; None where the kernels have no way to say it.

    With `lengths`, `query` and the result are flat, [1, H, N, D]: so many queries of each row, one row after the other.
    """
    call = flash_call(query, key, value, positions, once, lengths)
    if call is None:
        return None
    out = run(call, scale)
    return (out if call.rows is None else out.view(query.shape[0], query.shape[2], *out.shape[1:])).transpose(1, 2)


def flash_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Positions,
    once: Once[Any],
    lengths: Sequence[int] | None = None,
) -> FlashCall | None:
    """The call for these queries, rows or flat, over `key`, `value` [B, G, S, D]; None where there is none."""
    length = query.shape[2] if lengths is None else max(lengths)
    first, start, end, past, causal, window = positions
    query, left, right, longest, rows = query.transpose(1, 2), -1, -1, key.shape[2], None
    if window is not None and length > 1:
        # One query has its window as all of its keys.
        left = window - 1
        right = 0 if causal else left
    if lengths is None and len(first) == len(start) == len(end) == len(past) == 1:
        begin, stop = start[0], end[0]
        if (causal or window is not None) and stop != past[0] + length:
            return None
        if window is not None:
            begin = max(begin, past[0] - window + 1)
        longest = stop - begin
        key, value = (x.narrow(2, begin - first[0], longest).transpose(1, 2) for x in (key, value))
    else:
        batch, step = key.shape[0], _row_step(key)
        if step is None or step != _row_step(value) or batch * step > MAX_TOKENS:
            return None
        make_rows = RowsOf(positions, tuple(lengths or ()), batch, length, key.shape[2], step, key.device)
        found = once(("rows of flash attention", *make_rows), make_rows.make)
        if found is None:
            return None
        rows, longest = found
        query, key, value = query.flatten(0, 1), _as_tokens(key, step), _as_tokens(value, step)
    return FlashCall(
        query, key, value, longest_query=length, longest_key=longest, causal=causal, left=left, right=right, rows=rows
    )


def _row_step(x: Tensor) -> int | None:
    """Tokens from one row of `x` [B, G, S, D] to the next; None where that is no whole number."""
    row, _, token, _ = x.stride()
    return row // token if token and row % token == 0 else None


def _as_tokens(x: Tensor, step: int) -> Tensor:
    """`x` [B, G, S, D] as tokens [N, G, D], of which those of row b begin at `b * step`; nothing is copied."""
    batch, groups, columns, head_dim = x.shape
    _, head, token, _ = x.stride()
    return x.as_strided(((batch - 1) * step + columns, groups, head_dim), (token, head, 1))


_forward = torch.ops.aten._flash_attention_forward.default


def run(call: FlashCall, scale: float) -> Tensor:
    """The operator's result, of the shape of `call.query`."""
    rows = call.rows
    out: Tensor = _forward(
        call.query,
        call.key,
        call.value,
        cum_seq_q=None if rows is None else rows.queries,
        cum_seq_k=None if rows is None else rows.keys,
        max_q=call.longest_query,
        max_k=call.longest_key,
        dropout_p=0.0,
        is_causal=call.causal,
        return_debug_mask=False,
        scale=scale,
        window_size_left=call.left,
        window_size_right=call.right,
        seqused_k=None if rows is None else rows.used,
    )[0]
    return out
