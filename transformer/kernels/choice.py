"""Choice of a backend: one table, from the description of a call to the fastest way that serves it; no tensor."""

import torch

from .backends import Backend
from .biases import HALF_DTYPES
from .refusals import CallDescription, refusal_of_compiled, refusal_on_gpu
from .tuning import Tuning


def choose(call: CallDescription, limits: Tuning) -> Backend:
    """The backend of a call: the fastest that serves it."""
    plain = not (call.softcap or call.sinks or call.weights)
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
        mergeable = call.has_lse or call.dtype in HALF_DTYPES
        prefix = call.keys - call.length
        if call.causal and not use_matmul and mergeable and call.length > 1 and prefix >= limits.min_prefix:
            return Backend.PREFIX_MERGE
    return Backend.SDPA if plain and not use_matmul else Backend.MATMUL


def _choose_on_device(call: CallDescription, limits: Tuning, plain: bool) -> Backend:
    """The same on another device than the CPU."""
    if refusal_on_gpu(Backend.FLASH, call) is None:
        planned = call.causal and call.length == call.keys >= limits.min_planned_queries
        return Backend.SDPA if planned else Backend.FLASH
    if call.bias and refusal_on_gpu(Backend.FLEX, call) is None:
        return Backend.FLEX
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
