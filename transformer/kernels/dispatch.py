"""Dispatch: which backend serves a call of attention, in one table, and the call itself.

`choose` reads a description of the call and gives a backend; it needs no tensor. Where `backend(...)` asks for one,
`refusal` says why it cannot serve a call: an explicit request never falls back. The logger `transformer.kernels` names
the choice of each call at level DEBUG.
"""

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..tracing import is_one, is_traced, is_transformed
from . import private_operators, split_kv, tuning
from .backends import Backend, request
from .biases import HALF_DTYPES, causal_bias
from .inputs import AttentionInputs, Sinks
from .matmul import MatmulAttention
from .reference import reference_attention
from .sdpa import sdpa
from .tuning import Tuning

logger = logging.getLogger("transformer.kernels")


class CallDescription(NamedTuple):
    """One call of attention as `choose` sees it: sizes, dtype, options, and the state of PyTorch."""

    batch: int
    heads: int
    groups: int
    length: int
    keys: int
    dtype: torch.dtype
    cpu: bool = True
    bias: bool = False
    causal: bool = False
    """The queries are the last of the keys, in causal order."""
    softcap: bool = False
    sinks: bool = False
    weights: bool = False
    """The caller wants the attention weights."""
    dropout: bool = False
    inference: bool = True
    """On the CPU, without gradients, dropout and tracing."""
    traced: bool = False
    """One graph for every length: no size may be compared."""
    transformed: bool = False
    """Within a transform of `torch.func`, which runs SDPA once for each entry on the CPU."""
    threads: int = 1
    restricted: bool = False
    """`torch.nn.attention.sdpa_kernel` or its kin choose among SDPA's backends."""
    native_half: bool = False
    """The processor multiplies numbers of this 16-bit dtype itself."""
    has_lse: bool = True
    """This build of PyTorch gives the log-sum-exp of SDPA on the CPU."""


def choose(call: CallDescription, limits: Tuning) -> Backend:
    """The backend of a call: the fastest that serves it."""
    plain = not (call.softcap or call.sinks or call.weights)
    if call.traced:
        return Backend.SDPA if plain and not call.transformed else Backend.REFERENCE
    rows = call.length * (call.heads // call.groups)
    if not call.cpu or call.restricted:
        use_matmul = False
    elif call.dtype in HALF_DTYPES:
        use_matmul = _use_half_matmul(call, rows, limits)
    else:
        use_matmul = rows <= limits.max_matmul_rows and call.keys >= limits.min_matmul_keys
    if plain and call.inference and not call.bias and not call.restricted:
        if call.length == 1 and call.keys >= limits.min_split_keys and _threads_are_idle(call, rows, limits):
            return Backend.SPLIT_KV if call.threads >= limits.min_split_threads else Backend.SDPA
        mergeable = call.has_lse or call.dtype in HALF_DTYPES
        prefix = call.keys - call.length
        if call.causal and not use_matmul and mergeable and call.length > 1 and prefix >= limits.min_prefix:
            return Backend.PREFIX_MERGE
    return Backend.SDPA if plain and not use_matmul else Backend.MATMUL


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


def refusal(backend: Backend, call: CallDescription, limits: Tuning) -> str | None:
    """Why a backend cannot serve a call; None where it can."""
    if backend is Backend.REFERENCE:
        return None
    if backend is Backend.MATMUL:
        return "it depends on sizes, which a traced call leaves open" if call.traced else None
    for name in ("softcap", "sinks", "weights"):
        if getattr(call, name):
            return f"it has no {name}"
    if backend is Backend.SDPA:
        return None
    if call.bias or not call.inference:
        return "it has no bias" if call.bias else "it needs the CPU, without gradients, dropout and tracing"
    if call.restricted:
        return "it is no backend that sdpa_kernel() can allow, and one is in force"
    half = call.dtype in HALF_DTYPES
    if not call.has_lse and not (half and backend is Backend.PREFIX_MERGE):
        return "it needs SDPA's log-sum-exp, which this build of PyTorch does not give"
    if backend is Backend.PREFIX_MERGE:
        return None if call.causal and call.length < call.keys else "it is for causal queries after a prefix of keys"
    if half:
        return "it merges parts, which would be rounded twice in 16 bits"
    if call.length != 1 or call.keys < limits.split_kv_parts:
        return f"it is for one query over at least {limits.split_kv_parts} keys"
    return None


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
        transformed = traced and is_transformed(query, key, value)
        call = self._describe(query, key, bias, causal, sinks, transformed=transformed, **options)
        chosen = request.backend
        if chosen is None:
            chosen = choose(call, tuning.active)
        elif reason := refusal(chosen, call, tuning.active):
            raise ArgumentError(f"backend: {chosen.value!r} cannot serve this call: {reason}; ask for another. {call}")
        if not torch.compiler.is_dynamo_compiling() and logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s for %s", chosen.value, call)
        if chosen is Backend.SDPA:
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

    def use_prefix_merge(self, query: Tensor, key: Tensor) -> bool:
        """Whether causal order alone is faster for this chunk, which ends its keys, than a mask that says the same."""
        call = self._describe(query, key, causal=True)
        if request.backend is not None:
            return request.backend is Backend.PREFIX_MERGE and not refusal(Backend.PREFIX_MERGE, call, tuning.active)
        return choose(call, tuning.active) is Backend.PREFIX_MERGE

    def _describe(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None = None,
        causal: bool = False,
        sinks: Sinks | None = None,
        *,
        dropout: float = 0.0,
        return_weights: bool = False,
        traced: bool = False,
        transformed: bool = False,
    ) -> CallDescription:
        batch, heads, length, _ = query.shape
        _, groups, keys, _ = key.shape
        cpu, dtype = query.is_cpu, query.dtype
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
            inference=cpu and not traced and not dropout and not torch.is_grad_enabled() and not is_traced(query),
            traced=traced,
            transformed=transformed,
            # A compiler cannot trace the number of threads, and compiles none of the ways that ask for it.
            threads=1 if torch.compiler.is_dynamo_compiling() else torch.get_num_threads(),
            restricted=not (private_operators.flash_is_on() and private_operators.math_is_on()),
            native_half=dtype in private_operators.FUSED_HALF_DTYPES,
            has_lse=private_operators.SDPA_WITH_LSE,
        )
