"""Attention over some of the keys, with the log-sum-exp by which it is merged with attention over the others.

A result that is merged is rounded once more, so 16-bit queries and keys are computed in float32 here: a block of keys
at a time, or by the compiled kernel, which reads them as they are stored.
"""

import logging
from collections.abc import Iterable
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codecs import Coding
from . import private_operators, tuning
from .backends import Backend, request
from .biases import HIDDEN
from .compiled import switch
from .dispatch import Kernel, logger
from .few_queries import attend_few, is_readable
from .inputs import upcast
from .matmul import even_tiles
from .position_inputs import Positions
from .split_kv import merge_attention_states


class AttentionState(NamedTuple):
    """Attention `out` [B, H, L, D] over some keys, and the logarithms `lse` [B, H, L] of the sums of its exponentials.

    Both are float64 for float64 queries, else float32. A query without a key has 0 and -inf.
    """

    out: Tensor
    lse: Tensor

    def merged(self, other: "AttentionState") -> "AttentionState":
        """Attention over the keys of both."""
        out, lse = (
            merge_attention_states((self.out, other.out), (self.lse, other.lse)),
            torch.logaddexp(self.lse, other.lse),
        )
        # A query that sees no key of either has no share of them.
        return AttentionState(out.masked_fill((lse == HIDDEN).unsqueeze(-1), 0.0), lse)


def serves_parts(query: Tensor) -> bool:
    """Whether attention of these queries may be merged of parts: without gradients, and where no backend is asked for.

    A `with backend(...)`, `sdpa_kernel(...)` and autocast say how a whole call is computed.
    """
    device = "cpu" if query.is_cpu or query.is_meta else query.device.type
    return (
        not torch.is_grad_enabled()
        and request.backend is None
        and private_operators.flash_is_on()
        and private_operators.math_is_on()
        and not torch.is_autocast_enabled(device)
    )


def attention_state(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, positions: Positions, coding: Coding | None = None
) -> AttentionState:
    """Attention of `query` [B, H, L, D] over `key`, `value` [B, G, S, D] by positions without a window, not recorded.

    A row's last query is that of its last token, or of padding after it. With a `coding` keys and values are records.
    """
    batch, heads, length, _ = query.shape
    compiled = _is_compiled(query, key, value, coding)
    if logger.isEnabledFor(logging.DEBUG):
        call = kernel.describe((query, key, value), causal=positions.causal, coding=coding)
        logger.debug("%s with its log-sum-exp for %s", Backend.COMPILED.value if compiled else "parts", call)
    if compiled:
        lse = torch.empty(batch, heads, length, dtype=torch.float32, device="cpu")
        options: dict[str, Any] = {"softcap": kernel.softcap, "positions": positions, "coding": coding, "lse": lse}
        return AttentionState(attend_few(query.float(), key, value, kernel.scale, **options), lse)
    if coding is not None:
        key, value = coding.decoded(key, value)
    rows = list(positions.of_rows(max(map(len, positions[:4]))))
    if len(rows) == 1:
        return _over_columns(kernel, query, key, value, rows[0], positions.causal)
    # Rows that end apart, one by one: a mask would be read for every key, and hide no number that is NaN.
    states = []
    for row, numbers in enumerate(rows):
        part = slice(row, row + 1)
        states.append(_over_columns(kernel, query[part], key[part], value[part], numbers, positions.causal))
    return AttentionState(*(torch.cat(each) for each in zip(*states, strict=True)))


def biased_attention_state(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> AttentionState:
    """The same over all keys, with a float `bias` added to the scores: it broadcasts to [B, H, L, S], -inf hides a key.

    All scores of a block of keys are formed at once; the bias is formed by the caller.
    """
    if key.shape[2] == 0:
        return _over_keys(kernel, query, key, value, causal=False)
    shape, groups = query.shape, key.shape[1]
    bias = bias.expand(*shape[:3], key.shape[2]).reshape(shape[0] * groups, -1, key.shape[2])
    state = _tiled(kernel, query.reshape(shape[0], groups, -1, shape[3]), key, value, bias=bias)
    return AttentionState(state.out.reshape(shape), state.lse.reshape(shape[:3]))


def _is_compiled(query: Tensor, key: Tensor, value: Tensor, coding: Coding | None) -> bool:
    """Whether the compiled kernel reads these tensors, and is the fastest."""
    return (
        query.is_cpu
        and switch.are_available()
        and request.allows_compiled
        and is_readable(query, key, value, coding)
        and key.shape[2] > 0
        and query.shape[2] * (query.shape[1] // key.shape[1]) <= tuning.active.max_compiled_query_rows
    )


def _over_columns(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, numbers: tuple[int, int, int, int], causal: bool
) -> AttentionState:
    """Attention over the same columns in each row: those of the tokens from `start` to `end`, `first` in column 0."""
    first, start, end, past = numbers
    key, value = (x[:, :, start - first : end - first] for x in (key, value))
    length, real = query.shape[2], min(query.shape[2], end - past)
    if not causal or real == length == 1:
        return _over_keys(kernel, query, key, value, causal=False)
    batch, heads, _, head_dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    state = AttentionState(
        torch.zeros(batch, heads, length, head_dim, dtype=dtype, device=query.device),
        torch.full((batch, heads, length), HIDDEN, dtype=dtype, device=query.device),
    )
    if real > 0:
        query, before = query[:, :, :real], end - start - real
        own = _over_keys(kernel, query, key[:, :, before:], value[:, :, before:], causal=True)
        if before:
            own = own.merged(_over_keys(kernel, query, key[:, :, :before], value[:, :, :before], causal=False))
        if real == length:
            return own
        state.out[:, :, :real], state.lse[:, :, :real] = own
    return state


def _over_keys(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> AttentionState:
    """Attention over all keys or, `causal`, over as many keys as queries in their order."""
    shape = query.shape
    if key.shape[2] == 0:
        zeros = upcast(query).new_zeros(shape)
        return AttentionState(zeros, zeros[..., 0] + HIDDEN)
    if not causal:
        # The queries that share keys are rows of one product.
        query = query.reshape(*key.shape[:2], -1, shape[3])
    if (
        query.is_cpu
        and query.dtype in (torch.float32, torch.float64)
        and kernel.softcap is None
        and private_operators.SDPA_WITH_LSE
    ):
        state = AttentionState(*private_operators.sdpa_with_lse(query, key, value, causal, kernel.scale))
    else:
        state = _tiled(kernel, query, key, value, causal=causal)
    return AttentionState(state.out.reshape(shape), state.lse.reshape(shape[:3]))


def _tiled(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, bias: Tensor | None = None
) -> AttentionState:
    """The same by matrix products, a few key/value heads at a time; `bias` [B * G, queries, S]."""
    query = query.reshape(key.shape[0] * key.shape[1], -1, *query.shape[2:])
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    numbers = max(query.shape[1] * query.shape[2], query.shape[3]) * min(key.shape[1], tuning.active.upcast_keys)
    at_once = even_tiles(len(key), max(tuning.active.tile_bytes // (4 * numbers), 1))
    tiles = zip(*(torch.split(x, at_once) for x in (query, key, value)), strict=True)
    biases: Iterable[Tensor | None] = repeat(None) if bias is None else torch.split(bias, at_once)
    states = [_of_tile(kernel, tile, causal, own) for tile, own in zip(tiles, biases, strict=False)]
    return AttentionState(*(torch.cat(each) for each in zip(*states, strict=True)))


def _of_tile(kernel: Kernel, tile: tuple[Tensor, ...], causal: bool, bias: Tensor | None) -> AttentionState:
    """Attention of queries [N, R, L, D] over keys and values [N, S, D]: [N, R * L, D], a block of keys at a time."""
    query, *keys_and_values = tile
    _, repeats, length, _ = query.shape
    query, order = upcast(query).flatten(1, 2) * kernel.scale, torch.arange(length, device=query.device).repeat(repeats)
    states: list[AttentionState] = []
    begin = 0
    for key, value in zip(*(torch.split(x, tuning.active.upcast_keys, 1) for x in keys_and_values), strict=True):
        scores, end = query @ upcast(key).mT, begin + key.shape[1]
        if kernel.softcap is not None:
            scores = torch.tanh(scores / kernel.softcap) * kernel.softcap
        if bias is not None:
            scores = scores + bias[:, :, begin:end]
        if causal:
            after = torch.arange(begin, end, device=query.device) > order.unsqueeze(-1)
            scores = scores.masked_fill(after, HIDDEN)
        lse = torch.logsumexp(scores, -1)
        weights = torch.softmax(scores, -1)
        if causal or bias is not None:
            # Of a query that sees nothing of the whole block every score is -inf.
            weights = weights.masked_fill((lse == HIDDEN).unsqueeze(-1), 0.0)
        part = AttentionState(weights @ upcast(value), lse)
        states = [states[0].merged(part) if states else part]
        begin = end
    return states[0]
