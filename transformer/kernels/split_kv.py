"""Split keys: attention of one token over keys in parts, and of a chunk over what was cached before it and itself.

In float32 and float64 the parts are merged by the logarithms of their sums (flash decoding). A part in 16 bits comes
out rounded, and merging rounds again: up to 2.7 times the error of one kernel call. So 16-bit queries read all keys in
one call, whose causal order costs a mask of one row.
"""

import torch
from torch import Tensor

from . import private_operators, tuning
from .biases import HALF_DTYPES, HIDDEN
from .sdpa import sdpa


def merge_attention_states(outs: Tensor | tuple[Tensor, Tensor], lses: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Attention over all keys, from attention over parts of them and the logarithms of the sums of their exponentials.

    Either parts in dimension 1, `outs` [N, P, R, D] and `lses` [N, P, R], give [N, R, D]; or two of `outs` [..., D] and
    `lses` [...], which need not be copied next to each other, give [..., D]. The result has the dtype of `lses`.
    """
    if isinstance(outs, Tensor) and isinstance(lses, Tensor):
        return (outs * torch.softmax(lses, 1).unsqueeze(-1)).sum(1)
    difference = (lses[0] - lses[1]).unsqueeze(-1)
    # The share of either by itself: as 1 minus the other a small one would have lost its digits.
    share, other_share = torch.sigmoid(difference), torch.sigmoid(-difference)
    return torch.addcmul(outs[0] * share, outs[1].to(share.dtype), other_share)


def split_kv(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One token [B, H, 1, D] over keys [B, G, S, D] in parts next to each other, in float32 or float64."""
    batch, heads, _, head_dim = query.shape
    groups, keys = key.shape[1:3]
    parts = tuning.active.split_kv_parts
    number, length = batch * groups, keys // parts
    query = query.reshape(number, 1, heads // groups, head_dim)
    key, value = (x.reshape(number, 1, keys, head_dim) for x in (key, value))
    key_parts, value_parts = (x[:, 0, : parts * length].view(number, parts, length, head_dim) for x in (key, value))
    sdpa_with_lse = private_operators.sdpa_with_lse
    outs, lses = sdpa_with_lse(query.expand(-1, parts, -1, -1), key_parts, value_parts, False, scale)
    if rest := keys - parts * length:
        last, its_lse = sdpa_with_lse(query, key[:, :, -rest:], value[:, :, -rest:], False, scale)
        outs, lses = torch.cat((outs, last), 1), torch.cat((lses, its_lse), 1)
    return merge_attention_states(outs, lses).to(query.dtype).view(batch, heads, 1, head_dim)


def prefix_and_causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """A chunk [B, H, L, D] that ends its keys [B, G, S, D]: it sees those before it, and itself in causal order."""
    if query.dtype in HALF_DTYPES:
        return _in_one_softmax(query, key, value, scale)
    prefix = key.shape[2] - query.shape[2]
    # Nothing that is hidden is computed, no mask is read, and each key of the prefix is read once for its group.
    folded = query.reshape(*key.shape[:2], -1, query.shape[3])
    sdpa_with_lse = private_operators.sdpa_with_lse
    before, its_lse = sdpa_with_lse(folded, key[:, :, :prefix], value[:, :, :prefix], False, scale)
    itself, own_lse = sdpa_with_lse(query, key[:, :, prefix:], value[:, :, prefix:], True, scale)
    merged = merge_attention_states((before.reshape(query.shape), itself), (its_lse.reshape(own_lse.shape), own_lse))
    return merged.to(query.dtype)


def _in_one_softmax(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """With the last query first, row i sees the keys up to S - 1 - i: its mask is the next one's, shifted by one."""
    new, keys = query.shape[2], key.shape[2]
    rows_at_once = tuning.active.half_causal_rows
    order = torch.zeros(keys + min(new, rows_at_once) - 1, dtype=torch.float32, device=query.device)
    order[keys:] = HIDDEN
    outs = []
    for begin in range(0, new, rows_at_once):
        end = min(begin + rows_at_once, new)
        rows, visible = end - begin, keys - new + end
        mask = order.as_strided((1, 1, rows, visible), (0, 0, 1, 1), keys - visible)
        flipped = query[:, :, begin:end].flip(2)
        out = sdpa(flipped, key[:, :, :visible], value[:, :, :visible], mask, scale, fold=False)
        outs.append(out.flip(2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)
