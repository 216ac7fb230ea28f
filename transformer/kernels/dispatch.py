"""Dispatch: the one call of attention, described, chosen for (`choice.py`) and handed to a backend.

Where `backend(...)` asks for one, `refusal` says why it cannot serve a call: an explicit request never falls back. The
logger `transformer.kernels` names the choice of each call at level DEBUG.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..tracing import is_one, is_traced, is_transformed
from . import flash, private_operators, split_kv, tuning
from .backends import Backend, request
from .biases import causal_bias
from .choice import choose
from .compiled import switch
from .few_queries import Positioned, Positions, attend_few, is_readable
from .flash import Once
from .flex import flex
from .inputs import AttentionInputs, Sinks
from .matmul import MatmulAttention
from .reference import reference_attention
from .refusals import CallDescription, refusal
from .sdpa import sdpa

logger = logging.getLogger("transformer.kernels")

_WITHOUT_MASK = Backend.PREFIX_MERGE, Backend.COMPILED
"""Backends that know the causal order of a chunk, and read no mask."""


@dataclass(frozen=True)
class Kernel:
    """Attention with the scale and the soft cap of one module."""

    scale: float
    softcap: float | None = None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        *,
        causal: bool = False,
        sinks: Sinks | None = None,
        dropout: float = 0.0,
        return_weights: bool = False,
        traced: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` [B, H, L, D] over `key`, `value` [B, G, S, D]: output [B, H, L, D], weights or None.

        `bias` is added to the scaled scores and broadcasts to [B, H, L, S]; -inf hides a key. `causal=True` is for L
        queries that are the last of S keys: it hides what follows a query. Weights [B, H, L, n + S] (sinks first) are
        those before dropout. `traced=True`: no choice by a size and no private operator, so that one graph serves every
        length; `causal` is then for as many queries as keys.
        """
        options: Any = {"dropout": dropout, "return_weights": return_weights, "traced": traced}
        # The name of a device costs more than the question.
        device = "cpu" if query.is_cpu else query.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # In autocast's dtype, but not within autocast, which would round biases and scores.
            inputs = AttentionInputs(query, key, value, bias, sinks).cast(torch.get_autocast_dtype(device))
            query, key, value, bias, sinks = inputs
            with torch.autocast(device, enabled=False):
                return self(query, key, value, bias, causal=causal, sinks=sinks, **options)
        # The short way of a decode step, for which the table says the same: a description costs as much as the call.
        if (
            bias is None
            and sinks is None
            and not (dropout or return_weights or traced)
            and request.backend is None
            and not torch.compiler.is_dynamo_compiling()
            and not torch.is_grad_enabled()
            and private_operators.flash_is_on()
            and private_operators.math_is_on()
            and not logger.isEnabledFor(logging.DEBUG)
        ):
            if query.is_cpu:
                if (
                    not private_operators.HAS_AMX
                    and switch.are_available()
                    and is_readable(query, key, value)
                    and query.shape[2] * (query.shape[1] // key.shape[1]) <= tuning.active.max_compiled_query_rows
                    and key.shape[2] > 0
                ):
                    return attend_few(query, key, value, self.scale, softcap=self.softcap, causal=causal), None
            elif self.softcap is None and query.shape[2] == 1 and flash.is_served(query, key, value):
                return flash.flash(query, key, value, self.scale), None
        transformed = traced and is_transformed(query, key, value)
        call = self._describe((query, key, value), bias, causal, sinks, transformed=transformed, **options)
        chosen = request.backend
        if chosen is None:
            chosen = choose(call, tuning.active)
        elif reason := refusal(chosen, call, tuning.active):
            raise ArgumentError(f"backend: {chosen.value!r} cannot serve this call: {reason}; ask for another. {call}")
        if not torch.compiler.is_dynamo_compiling() and logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s for %s", chosen.value, call)
        if chosen is Backend.COMPILED:
            return attend_few(query, key, value, self.scale, softcap=self.softcap, causal=causal), None
        if chosen is Backend.FLASH:
            return flash.flash(query, key, value, self.scale, causal=causal), None
        if chosen is Backend.FLEX:
            bias = causal_bias(query, key, bias) if causal or bias is None else bias
            return flex(query, key, value, bias, self.scale), None
        if chosen is Backend.SDPA:
            # One query, the last of its keys, sees them all.
            causal = causal and (traced or query.shape[2] > 1)
            if causal and (bias is not None or (not traced and query.shape[2] < key.shape[2])):
                bias, causal = causal_bias(query, key, bias), False
            fold = not traced or is_one(query.shape[2])
            how = {"causal": causal, "fold": fold, "traced": traced}
            return sdpa(query, key, value, bias, self.scale, dropout=dropout, **how), None
        if chosen is Backend.SPLIT_KV:
            return split_kv.split_kv(query, key, value, self.scale), None
        if chosen is Backend.PREFIX_MERGE:
            return split_kv.prefix_and_causal(query, key, value, self.scale), None
        if chosen is Backend.MATMUL:
            bias = causal_bias(query, key, bias) if causal else bias
            inputs, matmul = AttentionInputs(query, key, value, bias, sinks), MatmulAttention(self.scale, self.softcap)
            if call.inference and not return_weights:
                return matmul.tiled(inputs), None
            out, weights = matmul(inputs, dropout)
        else:
            inputs = AttentionInputs(query, key, value, bias, sinks)
            out, weights = reference_attention(inputs, self.scale, self.softcap, causal=causal, dropout=dropout)
        return out, weights if return_weights else None

    def reads_positions(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether `by_positions` serves this call: on the CPU, for few query rows, where compiled kernels may run."""
        if not query.is_cpu or torch.is_grad_enabled() or not switch.are_available():
            return False
        if torch.is_autocast_enabled("cpu") or not request.allows_compiled or not is_readable(query, key, value):
            return False
        return refusal(Backend.COMPILED, self._describe((query, key, value)), tuning.active) is None

    def by_positions(self, query: Tensor, key: Tensor, value: Tensor, positioned: Positioned) -> Tensor:
        """Attention of `query` [B, H, L, D] by the positions of keys and queries, without a mask: [B, H, L, D]."""
        if logger.isEnabledFor(logging.DEBUG):
            bias, sinks = positioned.bias is not None, positioned.sinks is not None
            call = self._describe((query, key, value), causal=positioned.positions.causal)
            logger.debug("%s for %s", Backend.COMPILED.value, call._replace(bias=bias, sinks=sinks))
        return attend_few(query, key, value, self.scale, softcap=self.softcap, **positioned._asdict())

    def by_positions_on_gpu(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, once: Once[Any]
    ) -> Tensor | None:
        """The same by flash attention on a GPU, without sinks and biases of distances; None where it does not serve.

        `once` keeps what all layers of a call share.
        """
        if self.softcap is not None or request.backend not in (None, Backend.FLASH):
            return None
        if not flash.is_served(query, key, value):
            return None
        if not private_operators.flash_is_on() or not private_operators.math_is_on():
            return None
        if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is not query.dtype:
            return None
        out = flash.flash_by_positions(query, key, value, self.scale, positions, once)
        if out is not None and logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s for %s", Backend.FLASH.value, self._describe((query, key, value), causal=positions.causal))
        return out

    def prefers_causal(self, query: Tensor, key: Tensor) -> bool:
        """Whether causal order alone is faster for this chunk, which ends its keys, than a mask that says the same."""
        call = self._describe((query, key, key), causal=True)
        asked = request.backend
        if asked is None:
            return choose(call, tuning.active) in _WITHOUT_MASK
        return asked in _WITHOUT_MASK and not refusal(asked, call, tuning.active)

    def _describe(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None = None,
        causal: bool = False,
        sinks: Sinks | None = None,
        *,
        dropout: float = 0.0,
        return_weights: bool = False,
        traced: bool = False,
        transformed: bool = False,
    ) -> CallDescription:
        query, key, _ = tensors
        batch, heads, length, _ = query.shape
        _, groups, keys, _ = key.shape
        cpu, dtype = query.is_cpu, query.dtype
        inference = cpu and not traced and not dropout and not torch.is_grad_enabled() and not is_traced(query)
        return CallDescription(
            batch=batch,
            heads=heads,
            groups=groups,
            length=length,
            keys=keys,
            dtype=dtype,
            cpu=cpu,
            bias=bias is not None,
            causal=causal,
            softcap=self.softcap is not None,
            sinks=sinks is not None,
            weights=return_weights,
            dropout=dropout > 0.0,
            inference=inference,
            traced=traced,
            transformed=transformed,
            # A compiler cannot trace the number of threads, and compiles none of the ways that ask for it.
            threads=1 if torch.compiler.is_dynamo_compiling() else torch.get_num_threads(),
            restricted=not (private_operators.flash_is_on() and private_operators.math_is_on()),
            native_half=dtype in private_operators.FUSED_HALF_DTYPES,
            has_lse=private_operators.SDPA_WITH_LSE,
            amx=private_operators.HAS_AMX,
            compiled=inference and switch.are_available() and is_readable(*tensors),
            flash=flash.is_served(*tensors),
            compiling_for_gpu=query.is_cuda and torch.compiler.is_dynamo_compiling() and not traced,
        )
