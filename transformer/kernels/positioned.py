"""Attention by the positions of queries and keys, without a mask: compiled on the CPU, flash attention on a GPU."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs import Coding
from . import flash, private_operators, tuning
from .backends import Backend, request
from .compiled import switch
from .dispatch import Kernel, choose, logger
from .few_queries import attend_few, is_readable
from .flash_rows import Once
from .position_inputs import Positioned, Positions
from .refusals import refusal


def reads_positions(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, coding: Coding | None = None) -> bool:
    """Whether `by_positions` serves this call: on the CPU, for few query rows, where compiled kernels may run."""
    if not query.is_cpu or torch.is_grad_enabled() or not switch.are_available():
        return False
    if torch.is_autocast_enabled("cpu") or not request.allows_compiled or not is_readable(query, key, value, coding):
        return False
    few = query.shape[2] * (query.shape[1] // key.shape[1]) <= tuning.active.max_compiled_query_rows
    if few and key.shape[2] > 0 and not private_operators.HAS_AMX:
        # The short way, for which the table says the same: a description costs as much as the call.
        return bool(private_operators.flash_is_on() and private_operators.math_is_on())
    return refusal(Backend.COMPILED, kernel.describe((query, key, value), coding=coding), tuning.active) is None


def by_positions(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, positioned: Positioned, coding: Coding | None = None
) -> Tensor:
    """Attention of `query` [B, H, L, D] by the positions of keys and queries: [B, H, L, D].

    With a `coding`, keys, values and those of sinks are as that encodes them.
    """
    if logger.isEnabledFor(logging.DEBUG):
        bias, sinks = positioned.bias is not None, positioned.sinks is not None
        call = kernel.describe((query, key, value), causal=positioned.positions.causal, coding=coding)
        logger.debug("%s for %s", Backend.COMPILED.value, call._replace(bias=bias, sinks=sinks))
    return attend_few(query, key, value, kernel.scale, softcap=kernel.softcap, coding=coding, **positioned._asdict())


def by_positions_on_gpu(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Positions,
    once: Once[Any],
    lengths: Sequence[int] | None = None,
) -> Tensor | None:
    """The same on a GPU, for any number of queries without sinks and biases; None where flash attention cannot.

    `once` keeps what all layers of a call share. With `lengths`, queries of each row, `query` and the result are flat,
    [1, H, N, D], without padding between rows.
    """
    if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is not query.dtype:
        return None
    # Under a window other ways form masks, whatever the length.
    call = kernel.describe((query, key, value), causal=positions.causal and positions.window is None)
    chosen = request.backend or choose(call, tuning.active)
    if chosen is not Backend.FLASH or refusal(chosen, call, tuning.active) is not None:
        return None
    out = flash.flash_by_positions(query, key, value, kernel.scale, positions, once, lengths)
    if out is not None and logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s for %s", Backend.FLASH.value, call)
    return out
