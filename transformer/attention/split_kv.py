"""Attention of queries that end their keys, without a mask of their size, and of one token over keys in parts.

In float32 and float64 parts are merged by the logarithms of their sums (flash decoding). A part in 16 bits comes out
rounded, and merging rounds again: up to 2.7 times the error of one kernel call. So 16-bit queries meet all keys in one
call, whose causal order costs a mask of one row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import private_operators
from .biases import HALF_DTYPES, HIDDEN

SPLIT_KV_HEADS = (1, 3)
"""Key/value heads of the whole batch that leave one of two cores idle, unless their keys are cut into parts."""

PARTS, MIN_SPLIT_KEYS = 4, 4096
"""Parts of the keys of such heads, and the keys from which on they pay: up to 1.5 times at 16,384."""

MIN_PREFIX = 1024
"""Keys before a chunk from which on it needs no mask: 115 beside 167 ms for 256 over 16,384 in float32, G 4; 62 beside
92 ms in bfloat16 (two cores; AMD EPYC, Intel Xeon with AMX)."""

ROWS = 1024
"""Queries of one call in 16 bits: each block meets the keys up to its own end, so few of those that it does not see."""


def prefix_and_causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """A chunk [B, H, L, D] that ends its keys [B, G, S, D], and sees those before it and itself in causal order."""
    if query.dtype in HALF_DTYPES:
        return _in_one_softmax(query, key, value, scale)
    held = key.shape[2] - query.shape[2]
    # Nothing that is hidden is worked out, no mask is read, and each held key meets all queries of its group.
    folded = query.reshape(*key.shape[:2], -1, query.shape[3])
    sdpa = private_operators.sdpa_with_lse
    before, its_sum = sdpa(folded, key[:, :, :held], value[:, :, :held], False, scale)
    itself, own_sum = sdpa(query, key[:, :, held:], value[:, :, held:], True, scale)
    share = torch.sigmoid(its_sum.reshape(own_sum.shape) - own_sum).unsqueeze(-1)
    before, itself = (out.to(share.dtype) for out in (before.reshape(query.shape), itself))
    return itself.lerp(before, share).to(query.dtype)


def _in_one_softmax(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """With the last query first, row i sees the keys up to S - 1 - i: its mask is the next one's, shifted by one."""
    new, keys = query.shape[2], key.shape[2]
    order = torch.zeros(keys + min(new, ROWS) - 1, dtype=torch.float32, device=query.device)
    order[keys:] = HIDDEN
    outs = []
    for begin in range(0, new, ROWS):
        end = min(begin + ROWS, new)
        rows, seen = end - begin, keys - new + end
        mask = order.as_strided((1, 1, rows, seen), (0, 0, 1, 1), keys - seen)
        turned = query[:, :, begin:end].flip(2)
        block = key[:, :, :seen], value[:, :, :seen]
        out = F.scaled_dot_product_attention(turned, *block, mask, scale=scale, enable_gqa=True)
        outs.append(out.flip(2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def split_kv(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One token [B, H, 1, D] over keys [B, G, S, D] in parts side by side, in float32 or float64."""
    batch, heads, _, head_dim = query.shape
    groups, keys = key.shape[1:3]
    number, length = batch * groups, keys // PARTS
    query = query.reshape(number, 1, heads // groups, head_dim)
    key, value = (x.reshape(number, 1, keys, head_dim) for x in (key, value))
    beside = [x[:, 0, : PARTS * length].view(number, PARTS, length, head_dim) for x in (key, value)]
    sdpa = private_operators.sdpa_with_lse
    outs, sums = sdpa(query.expand(-1, PARTS, -1, -1), beside[0], beside[1], False, scale)
    if rest := keys - PARTS * length:
        last, its_sum = sdpa(query, key[:, :, -rest:], value[:, :, -rest:], False, scale)
        outs, sums = torch.cat((outs, last), 1), torch.cat((sums, its_sum), 1)
    out = (outs * torch.softmax(sums, 1).unsqueeze(-1)).sum(1)
    return out.to(query.dtype).view(batch, heads, 1, head_dim)
