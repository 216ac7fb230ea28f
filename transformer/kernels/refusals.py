"""Description of a call of attention, which has no tensor, and the reasons why a backend cannot serve it."""

from typing import NamedTuple

import torch

from .backends import Backend
from .biases import HALF_DTYPES
from .tuning import Tuning


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
    score_rule: bool = False
    """A function of the user's own changes the scores."""
    sink_logits: bool = False
    """A logit of each head takes a share of the attention."""
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
    amx: bool = False
    """The processor multiplies tiles of bfloat16 numbers, as SDPA does for many query rows."""
    compiled: bool = False
    """Compiled kernels may run, and read these tensors as they are: float32 or 16 bits, of contiguous heads."""
    flash: bool = False
    """Flash attention on a GPU reads these tensors as they are (`flash.is_served`)."""


def refusal(backend: Backend, call: CallDescription, limits: Tuning) -> str | None:
    """Why a backend cannot serve a call; None where it can."""
    if backend is Backend.REFERENCE:
        return None
    if backend is Backend.COMPILED:
        return refusal_of_compiled(call, limits)
    if backend is Backend.FLASH:
        return refusal_of_flash(call)
    if backend is Backend.MATMUL:
        return "it depends on sizes, which a traced call leaves open" if call.traced else None
    for name in ("softcap", "sinks", "score_rule", "sink_logits", "weights"):
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


def refusal_of_compiled(call: CallDescription, limits: Tuning) -> str | None:
    """Why the compiled kernel cannot serve a call; None where it can, and then it is the fastest."""
    if not call.inference:
        return "it needs the CPU, without gradients, dropout and tracing"
    if not call.compiled:
        return "it needs numba, MODULAR_ATTENTION_COMPILED not 0, no dispatch mode, and plain float32 or 16-bit tensors"
    if call.restricted:
        return "it is no backend that sdpa_kernel() can allow, and one is in force"
    for name in ("bias", "sinks", "score_rule", "weights"):
        if getattr(call, name):
            return f"it has no {name}"
    tiles = call.amx and call.dtype is torch.bfloat16
    most = limits.max_compiled_query_rows_beside_amx if tiles else limits.max_compiled_query_rows
    if call.length * (call.heads // call.groups) > most or call.keys == 0:
        return f"it is for 1 to {most} query rows of a key/value head over at least one key"
    return None


def refusal_of_flash(call: CallDescription) -> str | None:
    """Why flash attention on a GPU cannot serve a call; None where it can."""
    if not call.flash:
        return "it needs an NVIDIA GPU of compute capability 8.0 or more, 16 bits, head_dim % 8 == 0, and no gradients"
    if call.restricted:
        return "sdpa_kernel() is in force, and does not allow both flash attention and plain operations"
    for name in ("bias", "softcap", "sinks", "score_rule", "sink_logits", "weights", "dropout"):
        if getattr(call, name):
            return f"it has no {name}"
    return None
