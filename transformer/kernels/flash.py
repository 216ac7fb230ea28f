"""Flash attention on a GPU without a mask: PyTorch's kernels, told where the tokens of each row begin and end.

SDPA takes cuDNN for 16-bit numbers on some cards, and cuDNN makes a plan for each new number of keys, as every decode
step has one: 42 ms, once for all layers of a model (NVIDIA H200, PyTorch 2.11, 2026-11-28). Beside a mask it takes
neither kernel. FlashAttention-2, arXiv 2307.08691; parts of keys for few queries as in flash decoding.
"""

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..tracing import is_plain_eager
from . import tuning
from .biases import HALF_DTYPES
from .few_queries import Positions
from .private_operators import FLASH_ON_GPU

T = TypeVar("T")
Once = Callable[[Hashable, Callable[[], T]], T]
"""A function that keeps the result of another under a key, for all layers of a call."""

MAX_HEAD_DIM = 256
MAX_TOKENS = (1 << 31) - 1
"""Places of tokens are int32."""


class FlashRows(NamedTuple):
    """Where each row's tokens stand among those of all rows: int32 on the device."""

    queries: Tensor
    """[B + 1]: the first query of each row, and the number of all."""
    keys: Tensor
    """[B + 1]: the first key of each row, and an end."""
    used: Tensor
    """[B]: keys that a row has, counted from there."""


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
    query: Tensor, key: Tensor, value: Tensor, scale: float, positions: Positions, once: Once[Any]
) -> Tensor | None:
    """The same where `positions` say what a query sees; None where the kernels have no way to say it, or are slower."""
    length = query.shape[2]
    if positions.causal and positions.window is None and length == key.shape[2] >= tuning.active.min_planned_queries:
        return None
    call = planned(query, key, value, positions, once)
    if call is None:
        return None
    out = run(call, scale)
    return (out if call.rows is None else out.view(query.shape[0], length, *out.shape[1:])).transpose(1, 2)


def planned(query: Tensor, key: Tensor, value: Tensor, positions: Positions, once: Once[Any]) -> FlashCall | None:
    """The call for `query` [B, H, L, D] over `key`, `value` [B, G, S, D]; None where there is none."""
    length, columns = query.shape[2], key.shape[2]
    first, start, end, past, causal, window = positions
    query, left, right, longest, rows = query.transpose(1, 2), -1, -1, columns, None
    if window is not None and length > 1:
        # One query has its window as all of its keys.
        left = window - 1
        right = 0 if causal else left
    if len(first) == len(start) == len(end) == len(past) == 1:
        begin, stop = start[0], end[0]
        if (causal or window is not None) and stop != past[0] + length:
            return None
        if window is not None:
            begin = max(begin, past[0] - window + 1)
        longest = stop - begin
        key, value = (x.narrow(2, begin - first[0], longest).transpose(1, 2) for x in (key, value))
    else:
        step = _row_step(key)
        if step is None or step != _row_step(value) or key.shape[0] * step > MAX_TOKENS:
            return None
        make_rows = _RowsOf(positions, query.shape[0], length, columns, step, key.device)
        found = once(("rows of flash attention", *make_rows), make_rows.make)
        if found is None:
            return None
        rows, longest = found
        query, key, value = query.flatten(0, 1), _as_tokens(key, step), _as_tokens(value, step)
    return FlashCall(
        query, key, value, longest_query=length, longest_key=longest, causal=causal, left=left, right=right, rows=rows
    )


class _RowsOf(NamedTuple):
    """What the rows of a call follow from."""

    positions: Positions
    batch: int
    length: int
    columns: int
    step: int
    device: torch.device

    def make(self) -> tuple[FlashRows, int] | None:
        """The rows, and the most keys of one; None where the kernel would take padding for tokens."""
        first, start, end, past, causal, window = self.positions
        batch, length = self.batch, self.length
        spread = (each if len(each) == batch else each * batch for each in map(tuple, (first, start, end, past)))
        begins, used = [], []
        for row, (low, begin, stop, before) in enumerate(zip(*spread, strict=True)):
            if causal or window is not None:
                # A row with fewer new tokens ends with padding, which its own queries are before.
                if not causal and stop != before + length:
                    return None
                stop = before + length
                if stop - low > self.columns:
                    return None
            if window is not None and length == 1:
                begin = max(begin, before - window + 1)
            begins.append(row * self.step + begin - low)
            used.append(max(stop - begin, 0))
        queries = range(0, (batch + 1) * length, length)
        numbers = torch.tensor([*queries, *begins, batch * self.step, *used], dtype=torch.int32, device="cpu")
        # A copy from pageable host memory does not wait for the work that is queued on the device.
        parts = numbers.to(self.device, non_blocking=True).split_with_sizes((batch + 1, batch + 1, batch))
        return FlashRows(*parts), max(used)


def _row_step(x: Tensor) -> int | None:
    """Tokens from one row of `x` [B, G, S, D] to the next; None where that is no whole number."""
    row, _, token, _ = x.stride()
    return row // token if token and row % token == 0 else None


def _as_tokens(x: Tensor, step: int) -> Tensor:
    """`x` [B, G, S, D] as tokens [N, G, D], of which those of row b begin at `b * step`; nothing is copied."""
    batch, groups, columns, head_dim = x.shape
    _, head, token, _ = x.stride()
    return x.as_strided(((batch - 1) * step + columns, groups, head_dim), (token, head, 1))


def run(call: FlashCall, scale: float) -> Tensor:
    """The operator's result, of the shape of `call.query`."""
    rows = call.rows
    out: Tensor = torch.ops.aten._flash_attention_forward(
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
