"""Snapshot of a cache as plain tensors and numbers, for `deepcopy`, `pickle` and files."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .append import moved
from .buffers import KVBuffers, changed, ordinary
from .contents import CacheContents
from .cross_kv import CrossKV
from .fingerprint import TensorFingerprint
from .kept import KeptTokens
from .lease import Lease
from .lengths import Lengths
from .observed import Observed
from .shared_prefix import SharedPrefix
from .spec import CacheSpec
from .state import SelfAttentionState, check_whole

SELF = ("self.key", "self.value", "self.sink_key", "self.sink_value")
PREFIX = ("self.prefix_key", "self.prefix_value")
KEPT = "self.kept"
OBSERVED = ("self.queries", "self.weights")
CROSS = ("cross.key", "cross.value", "cross.kv", "cross.mask")


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that attention works on."""

FLOATS_BY_NAME: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


class Snapshot(NamedTuple):
    """Numbers by name, fit for JSON, and detached tensors by name that share memory with no other."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]

    def dtype(self) -> torch.dtype:
        """The dtype in which records are read. Raises KeyError where the snapshot has none."""
        return FLOATS_BY_NAME[self.numbers["dtype"]]


def snapshot_of(contents: CacheContents) -> Snapshot:
    """The tokens in a cache, and those that `truncate` may need again, without unused slots."""
    state, source = contents.ordered_state, contents.source
    numbers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    if state is not None:
        check_whole(state, "copies and files")
        compact = moved(state, max(state.length - state.stored), state.stored)
        numbers = {name: list(getattr(compact, name)) for name in ("stored", "start", "length")}
        numbers["window"] = state.window
        tensors.update(zip(SELF, compact.buffers.tensors, strict=False))
        if state.prefix is not None:
            # Once, as it is held.
            width = max(state.offset)
            numbers["prefix_rows"] = list(state.prefix.rows)
            shared = (_copied(tensor[:, :, :width]) for tensor in state.prefix.tensors)
            tensors.update(zip(PREFIX, shared, strict=True))
        if compact.kept is not None:
            numbers |= {"kept_first": list(compact.kept.first), "kept_end": list(compact.kept.end)}
            tensors[KEPT] = _copied(compact.kept.positions)
        pairs = zip(OBSERVED, compact.observed or (), strict=False)
        tensors.update((name, _copied(tensor)) for name, tensor in pairs if tensor is not None)
    if source is not None:
        copy = source.mapped(lambda tensor: tensor.detach().clone())
        kept = zip(CROSS, (copy.key, copy.value, *copy.made_of), strict=True)
        tensors.update((name, tensor) for name, tensor in kept if tensor is not None)
    coding = next((kept.coding for kept in (state and state.buffers, source) if kept is not None), None)
    if coding is not None:
        numbers["dtype"] = str(coding.dtype).removeprefix("torch.")
    return Snapshot(numbers, tensors)


def from_snapshot(spec: CacheSpec, snapshot: Snapshot) -> CacheContents:
    """The state and source of a snapshot of a cache of `spec`, on its own tensors (copies of those made in inference
    mode).

    A source cannot know the weights of the module that it will serve: it is projected anew there.
    """
    numbers = snapshot.numbers
    tensors = {name: ordinary(tensor) for name, tensor in snapshot.tensors.items()}
    state = source = coding = None
    if spec.cache_dtype is not None and tensors:
        coding = spec.coding(snapshot.dtype())
    if SELF[0] in tensors:
        buffers = KVBuffers.of((tensors[name] for name in SELF if name in tensors), Lease(object()), coding)
        stored, start, length = (Lengths(numbers[name]) for name in ("stored", "start", "length"))
        state = SelfAttentionState.compact(buffers, stored, start, length, numbers["window"])
        if PREFIX[0] in tensors:
            key, value = (tensors[name] for name in PREFIX)
            state = state._replace(prefix=SharedPrefix(key, value, tuple(numbers["prefix_rows"])))
        if KEPT in tensors:
            first, end = (Lengths(numbers[name]) for name in ("kept_first", "kept_end"))
            state = state._replace(kept=KeptTokens(tensors[KEPT], first, end))
        observed = Observed(*(tensors.get(name) for name in OBSERVED))
        if observed.tensors:
            state = state._replace(observed=observed)
    if CROSS[0] in tensors:
        kept = (tensors.get(name) for name in CROSS[2:])
        kv, mask = (
            None if tensor is None else TensorFingerprint(tensor, tensor._version, copied=True) for tensor in kept
        )
        source = CrossKV(tensors[CROSS[0]], tensors[CROSS[1]], kv, mask, coding=coding)
    return CacheContents(state, source)


def _copied(tensor: Tensor) -> Tensor:
    return changed(lambda each: each.detach().clone(), tensor)
