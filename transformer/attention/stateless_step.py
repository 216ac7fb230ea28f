"""Stateless step: self-attention over buffers that come as arguments and go back as new tensors.

A token at position `p` of its row lies in slot `p`. Nothing is written into what was given, so the step is a plain
function of its tensors, as exported programs need it.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import Step
from ..errors import DtypeError
from ..kernels import is_fully_masked
from ..positions import Rotation
from ..tracing import is_traced
from .call import AttentionCall
from .cross_attention import attend_to_source, check_no_rules
from .heads import CachedHeads
from .traced import PositionedKeys, sinks_apart, window_bias


class Slots(NamedTuple):
    """Keys and values of one layer, [B, G, C, D] each, by position."""

    key: Tensor
    value: Tensor


def stateless_step(heads: CachedHeads, x: Tensor, step: Step, slots: Slots) -> tuple[Tensor, Slots]:
    """`x` [B, L, E] at the positions of `step`, after the tokens in `slots`: output [B, L, E], and the slots after it.

    Slots from a row's first new position on may contain anything; the new ones contain 0 after its last. Raises
    DtypeError for slots of another dtype than the new keys.
    """
    if step.at is None:
        raise RuntimeError("stateless_step: expected a step with positions in a tensor")
    at, rule, position = step.at, step.rule, heads.position
    query, key, value = heads.query_key_value(x)
    unrotated = query
    if isinstance(position, Rotation):
        table = step.once(("angles", position, key.dtype), partial(position.table, at, key))
        query, key = position.rotate(query, table), position.rotate(key, table)
    slot = torch.arange(slots.key.shape[2], device=x.device).unsqueeze(0)
    unused = step.once("unused", lambda: (slot >= at[:, :1])[:, None, :, None])
    slots = Slots(*(_written(*pair, at, unused) for pair in zip(slots, (key, value), strict=True)))
    make, rules = partial(window_bias, position, query, at, slot, rule), heads.rules
    bias = step.once(("bias", position, query.dtype), make)
    sinks = change = fully_masked = None
    if rule.window is not None and rule.num_sinks:
        sinks = sinks_apart(position, unrotated, PositionedKeys(*slots, slot), at, rule, rules=rules).sinks
    if rules is not None:
        bias, change = rules.masked(bias, at, slot, heads.num_heads), rules.change(at, slot)
        # A rule may hide all keys of a query, which the kernel only expects where scores are changed.
        fully_masked = is_fully_masked(bias, None if sinks is None else sinks.bias)
        if change is None:
            bias = bias.masked_fill(fully_masked, 0.0)
    options: Any = {"sink_logits": heads.sink_logits, "traced": is_traced(query)}
    out, _ = heads.kernel(query, *slots, bias, sinks=sinks, change=change, **options)
    return heads.out(out if fully_masked is None else out.masked_fill(fully_masked, 0.0)), slots


def _written(buffer: Tensor, new: Tensor, at: Tensor, unused: Tensor) -> Tensor:
    """`buffer` [B, G, C, D] with tokens [B, G, L, D] at positions `at` [B, L], and 0 in the other unused slots.

    0, since a weight of 0 does not hide a NaN. An unknown position raises (below zero too, where ONNX would count from
    the end).
    """
    if buffer.dtype is not new.dtype:
        raise DtypeError(
            f"keys, values: expected {new.dtype}, as the module's new ones, got {buffer.dtype}; convert them"
        )
    index = at.where(at >= 0, buffer.shape[2])[:, None, :, None].expand_as(new)
    return buffer.masked_fill(unused, 0.0).scatter(2, index, new)


def stateless_cross_step(heads: CachedHeads, x: Tensor, source: Slots, real: Tensor) -> Tensor:
    """`x` [B, L, E] over the projected keys and values [B, G, S, D] of a source, `real` bool [B, S]: [B, L, E].

    Raises ArgumentError for a module with rules of positions, as a call with `kv` does.
    """
    check_no_rules(heads.rules)
    call = AttentionCall(heads=heads, x=x, kv_real=real, sink_logits=heads.sink_logits)
    out, _ = attend_to_source(call, heads.query(x), *source)
    return heads.out(out)
