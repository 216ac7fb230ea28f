"""SDPA: the only call of PyTorch's `scaled_dot_product_attention`, and the shapes in which it reads each key once."""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from . import private_operators, tuning
from .biases import HALF_DTYPES, bias_by_group, takes_float32_bias
from .gpu_groups import shares_keys


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    fold: bool = True,
    traced: bool = False,
) -> Tensor:
    """Attention of `query` [B, H, L, D] over `key`, `value` [B, G, S, D]: [B, H, L, D].

    `causal=True` is for as many queries as keys and no bias. `fold=False` leaves groups to SDPA, as a traced call has
    to where it may have more than one query. `traced=True`: no other size is compared.
    """
    shape, folded, dtype = query.shape, False, query.dtype
    if dtype in HALF_DTYPES and not traced and torch.is_grad_enabled() and _upcast_for_gradients(query, key, value):
        query, key, value = query.float(), key.float(), value.float()
    # Under `jit.trace` sizes are tensors; there groups of one head are let pass as groups.
    jit = not fold and torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    gqa = jit
    # A branch, because a compiler for which numbers of heads are symbols gives SDPA a symbol for the comparison itself.
    if not jit and shape[1] != key.shape[1]:
        gqa = True
    if fold and gqa and not (query.is_cuda and shares_keys(query, key, value, bias, traced)):
        (batch, heads, length, head_dim), groups = shape, key.shape[1]
        if length == 1:
            # The query heads of a group are rows of one product, which reads their keys once.
            tasks = 1 if traced or bias is not None or query.dtype is not torch.bfloat16 else _tasks(query, key)
            query = query.reshape(batch, groups * tasks, heads // groups // tasks, head_dim)
            folded, causal, gqa = True, False, tasks > 1
            if bias is not None:
                bias = bias_by_group(bias, groups, heads // groups).squeeze(3)
        elif not query.is_cpu and (bias is not None or query.is_cuda):
            query, key, value, bias = _folded(query, key, value, bias)
            folded, gqa = True, False
    if bias is not None:
        if query.dtype not in HALF_DTYPES or not takes_float32_bias(query):
            bias = bias.to(query.dtype)
        # Of three dimensions it would make SDPA form all scores.
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    out = F.scaled_dot_product_attention(
        query, key, value, bias, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=gqa
    )
    if out.dtype is not dtype:
        out = out.to(dtype)
    return out.reshape(*shape[:3], out.shape[3]) if folded else out


def _upcast_for_gradients(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if these 16-bit numbers are on the CPU and need gradients, whose products of small parts are slow there."""
    if not query.is_cpu or not (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    native = query.dtype in private_operators.FUSED_HALF_DTYPES
    return not native or key.shape[2] <= tuning.active.max_upcast_keys


def use_float32(query: Tensor, keys: int) -> bool:
    """True if SDPA of so many keys at most is faster for 16-bit queries [B, H, L, D] on the CPU if all are float32."""
    if query.dtype not in HALF_DTYPES or not query.is_cpu or private_operators.HAS_AMX:
        return False
    if query.dtype not in private_operators.FUSED_HALF_DTYPES:
        return True
    limits = tuning.active
    return keys <= limits.max_upcast_keys and query.shape[3] <= limits.max_upcast_head_dim


def _folded(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Groups as rows of the batch, and each key shared by all queries of its group: through a stride of 0 in a cache.

    On other devices, where no fast kernel takes groups together with a mask, or with float32.
    """
    batch, groups = key.shape[:2]
    per_group = query.shape[1] // groups
    query = rearrange(query, "b (g r) l d -> (b g) r l d", g=groups)
    key, value = (repeat(x, "b g s d -> (b g) r s d", r=per_group) for x in (key, value))
    if bias is not None and bias.ndim > 2:
        bias = bias_by_group(bias, groups, per_group)
        bias = bias.expand(batch, groups, *bias.shape[2:]).flatten(0, 1)
    return query, key, value, bias


def _tasks(query: Tensor, key: Tensor) -> int:
    """Tasks for the bfloat16 query rows of one key/value head: two for two rows, or for the only head of the call.

    Each task reads the keys again. Two rows are two tasks at any length and number of threads: 309 instead of 714
    microseconds with two threads, 527 instead of 817 with one (Intel Xeon, 2026-11-27).
    """
    rows = query.shape[1] // key.shape[1]
    if query.dtype not in private_operators.FUSED_HALF_DTYPES or not query.is_cpu:
        return 1
    if rows == 2:
        return 2
    limits = tuning.active
    one_head = key.shape[0] * key.shape[1] == 1 and rows % 2 == 0 and key.shape[2] >= limits.min_shared_head_keys
    # A compiler cannot trace the number of threads.
    parallel = torch.compiler.is_dynamo_compiling() or torch.get_num_threads() >= limits.min_split_threads
    return 2 if one_head and parallel else 1
