"""Dispatch: which backend serves a call of attention, in one table, and the call itself.

`choose` reads a description of the call and gives a backend; it needs no tensor. Where `backend(...)` asks for one,
`refusal` says why it cannot serve a call: an explicit request never falls back. The logger `transformer.kernels` names
the choice of each call at level DEBUG.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codecs import Coding
from ..errors import ArgumentError
from ..tracing import is_one, is_traced, is_transformed
from . import flash, private_operators, split_kv, tuning
from .backends import Backend, request
from .biases import HALF_DTYPES, ScoreChange, causal_bias
from .compiled import switch
from .few_queries import attend_few, is_readable
from .inputs import AttentionInputs, Sinks
from .matmul import MatmulAttention
from .reference import reference_attention
from .refusals import CallDescription, refusal, refusal_of_compiled, refusal_of_flash
from .sdpa import sdpa
from .sink_logits import attend_beside
from .tuning import Tuning

logger = logging.getLogger("transformer.kernels")

_WITHOUT_MASK = Backend.PREFIX_MERGE, Backend.COMPILED
"""Backends that know the causal order of a chunk, and read no mask."""


def choose(call: CallDescription, limits: Tuning) -> Backend:
    """The backend of a call: the fastest that serves it."""
    plain = not (call.softcap or call.sinks or call.score_rule or call.sink_logits or call.weights)
    if call.traced:
        return Backend.SDPA if plain and not call.transformed else Backend.REFERENCE
    if not call.cpu:
        return _choose_on_device(call, limits, plain)
    if call.compiled and refusal_of_compiled(call, limits) is None:
        return Backend.COMPILED
    rows = call.length * (call.heads // call.groups)
    if call.restricted:
        use_matmul = False
    elif call.dtype in HALF_DTYPES:
        use_matmul = _use_half_matmul(call, rows, limits)
    else:
        use_matmul = rows <= limits.max_matmul_rows and call.keys >= limits.min_matmul_keys
    if plain and call.inference and not call.bias and not call.restricted:
        if call.length == 1 and call.keys >= limits.min_split_keys and _threads_are_idle(call, rows, limits):
            return Backend.SPLIT_KV if call.threads >= limits.min_split_threads else Backend.SDPA
        mergeable, prefix = call.has_lse or call.dtype in HALF_DTYPES, call.keys - call.length
        if call.causal and not use_matmul and mergeable and call.length > 1 and prefix >= limits.min_prefix:
            return Backend.PREFIX_MERGE
    return Backend.SDPA if plain and not use_matmul else Backend.MATMUL


def _choose_on_device(call: CallDescription, limits: Tuning, plain: bool) -> Backend:
    """The same on another device than the CPU."""
    if refusal_of_flash(call) is None:
        cudnn_pays = call.causal and call.length == call.keys >= limits.min_cudnn_queries
        return Backend.SDPA if cudnn_pays else Backend.FLASH
    return Backend.SDPA if plain else Backend.MATMUL


def _use_half_matmul(call: CallDescription, rows: int, limits: Tuning) -> bool:
    """True if products of upcast numbers are faster for these 16-bit query rows per key/value head."""
    most = 1 if call.dtype is torch.bfloat16 else limits.max_matmul_rows
    return not call.native_half and rows <= most and call.batch * call.groups * call.keys >= limits.min_half_matmul_keys


def _threads_are_idle(call: CallDescription, rows: int, limits: Tuning) -> bool:
    """True if the key/value heads of one token leave threads idle, to which parts of the keys would give work."""
    if call.dtype in HALF_DTYPES or not call.has_lse:
        return False
    heads, parts = call.batch * call.groups, limits.split_kv_parts
    if call.threads <= 2:
        if heads not in limits.split_kv_heads:
            return False
    else:
        # Parts that the busiest thread reads, whole heads of them and split: a quarter less, as in the measured cases.
        whole, split = parts * -(-heads // call.threads), -(-heads * parts // call.threads)
        if heads >= 2 * call.threads or 4 * split > 3 * whole:
            return False
    # Over so many keys products use all threads for one head, and are faster while rows are few.
    return (
        call.dtype is not torch.float32
        or call.keys < limits.min_onednn_keys
        or not 1 < rows <= limits.max_matmul_rows_over_long_keys
    )


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
        change: ScoreChange | None = None,
        sink_logits: Tensor | None = None,
        dropout: float = 0.0,
        return_weights: bool = False,
        traced: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` [B, H, L, D] over `key`, `value` [B, G, S, D]: output [B, H, L, D], weights or None.

        `bias` is added to the scaled scores and broadcasts to [B, H, L, S]; -inf hides a key. `causal=True` is for L
        queries that are the last of S keys: it hides what follows a query. `change` is applied before the bias; sinks
        then have their own. `sink_logits` [H] join the denominators of the softmax. Weights [B, H, L, n + S] (sinks
        first) are those before dropout. `traced=True`: no choice by a size and no private operator, so one graph serves
        every length; `causal` is for as many queries as keys.
        """
        options: Any = {"dropout": dropout, "return_weights": return_weights, "traced": traced}
        # The name of a device costs more than the question.
        device = "cpu" if query.is_cpu else query.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # In autocast's dtype, but not within autocast, which would round biases and scores.
            inputs = AttentionInputs(query, key, value, bias, sinks).cast(torch.get_autocast_dtype(device))
            options |= {"change": change, "sink_logits": sink_logits}
            with torch.autocast(device, enabled=False):
                return self(*inputs[:4], causal=causal, sinks=inputs.sinks, **options)
        # The short way of a decode step, for which the table says the same: a description costs as much as the call.
        simple = (
            (bias is None and sinks is None and change is None and sink_logits is None)
            and not (dropout or return_weights or traced)
            and request.backend is None
            and not torch.compiler.is_dynamo_compiling()
            and not torch.is_grad_enabled()
        )
        few = (
            simple
            and query.is_cpu
            and not private_operators.HAS_AMX
            and switch.are_available()
            and is_readable(query, key, value)
            and query.shape[2] * (query.shape[1] // key.shape[1]) <= tuning.active.max_compiled_query_rows
            and key.shape[2] > 0
        )
        one_on_gpu = simple and query.is_cuda and self.softcap is None and query.shape[2] == 1
        one_on_gpu = one_on_gpu and flash.is_served(query, key, value)
        if (
            (few or one_on_gpu)
            and private_operators.flash_is_on()
            and private_operators.math_is_on()
            and not logger.isEnabledFor(logging.DEBUG)
        ):
            if few:
                return attend_few(query, key, value, self.scale, softcap=self.softcap, causal=causal), None
            return flash.flash(query, key, value, self.scale), None
        transformed = traced and is_transformed(query, key, value)
        call = self.describe((query, key, value), bias, causal, sinks, transformed=transformed, **options)
        if change is not None or sink_logits is not None:
            call = call._replace(score_rule=change is not None, sink_logits=sink_logits is not None)
        chosen = request.backend
        if chosen is None:
            chosen = choose(call, tuning.active)
        elif reason := refusal(chosen, call, tuning.active):
            raise ArgumentError(f"backend: {chosen.value!r} cannot serve this call: {reason}; ask for another. {call}")
        if not torch.compiler.is_dynamo_compiling() and logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s for %s", chosen.value, call)
        if chosen is Backend.COMPILED:
            return attend_beside(sink_logits, query, key, value, self.scale, softcap=self.softcap, causal=causal), None
        if chosen is Backend.FLASH:
            return flash.flash(query, key, value, self.scale, causal=causal), None
        if chosen is Backend.SDPA:
            # One query, the last of its keys, sees them all.
            causal = causal and (traced or query.shape[2] > 1)
            if causal and (bias is not None or (not traced and query.shape[2] < key.shape[2])):
                bias, causal = causal_bias(query, key, bias), False
            how: Any = {"causal": causal, "fold": not traced or is_one(query.shape[2]), "traced": traced}
            return sdpa(query, key, value, bias, self.scale, dropout=dropout, **how), None
        if chosen in (Backend.SPLIT_KV, Backend.PREFIX_MERGE):
            by_parts = split_kv.split_kv if chosen is Backend.SPLIT_KV else split_kv.prefix_and_causal
            return by_parts(query, key, value, self.scale), None
        inputs = AttentionInputs(query, key, value, bias, sinks, change, sink_logits)
        if chosen is Backend.REFERENCE:
            out, weights = reference_attention(inputs, self.scale, self.softcap, causal=causal, dropout=dropout)
        else:
            inputs = inputs._replace(bias=causal_bias(query, key, bias)) if causal else inputs
            matmul = MatmulAttention(self.scale, self.softcap)
            if call.inference and change is None and not return_weights:
                return matmul.tiled(inputs), None
            out, weights = matmul(inputs, dropout)
        return out, weights if return_weights else None

    def prefers_causal(self, query: Tensor, key: Tensor) -> bool:
        """Whether causal order alone is faster for this chunk, which ends its keys, than a mask that says the same."""
        call, asked = self.describe((query, key, key), causal=True), request.backend
        if asked is None:
            return choose(call, tuning.active) in _WITHOUT_MASK
        return asked in _WITHOUT_MASK and not refusal(asked, call, tuning.active)

    def describe(
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
        coding: Coding | None = None,
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
            compiled=inference and switch.are_available() and is_readable(*tensors, coding),
            flash=not cpu and flash.is_served(*tensors),
        )
