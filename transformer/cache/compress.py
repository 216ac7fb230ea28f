"""Compression of a state: each row and key/value head keeps the tokens of the highest scores of a policy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, CacheStateError, DeviceError, DtypeError, ShapeError, shown
from ..masks import NO_TOKEN
from .buffers import KVBuffers, ordinary
from .kept import KeptTokens, padded
from .lease import Lease
from .lengths import Lengths
from .observed import Observed
from .policy import NOTHING, AnyPolicy, Needs
from .spec import CacheSpec
from .state import SelfAttentionState

KeysAndValues = tuple[Tensor, Tensor]
"""[B, G, S, D] each, as attention reads them."""


def compressed(
    state: SelfAttentionState, shown_tokens: KeysAndValues, keep: int, by: AnyPolicy, spec: CacheSpec
) -> SelfAttentionState:
    """The state with at most `keep` tokens of each row, of which one has more; `shown_tokens` are its keys and values
    in order.

    Rows of `keep` tokens or fewer stay as they are. Sinks stay, and count among the `keep`, which is more than they
    are. Raises as `CacheOperations.compress`.
    """
    cached, batch = state.cached_lengths(), state.buffers.key.shape[0]
    sinks = 0 if state.buffers.sink_key is None else state.buffers.sink_key.shape[2]
    positions = state.true_positions()
    scores = _scores(by, shown_tokens, positions, state.observed)
    chosen = _highest(scores, sinks, cached, keep - sinks)

    dropping = [number > keep for number in cached.expand(batch)]
    old = KeptTokens.nothing(state.buffers.key) if state.kept is None else state.kept
    stored = _of_rows(dropping, state.length - (keep - sinks), state.stored)
    first, end = _of_rows(dropping, stored, old.first), _of_rows(dropping, state.length, old.end)
    kept = _in_rows(dropping, positions.gather(2, chosen), old.positions, max(end - first), NO_TOKEN)

    # Columns in order begin with the evicted sinks, which have no slot here.
    shift = state.slot(state.start - state.evicted_sinks())
    run = _run(state.slot(stored), max(state.length - stored), chosen)
    slots = _in_rows(dropping, chosen + shift.column(chosen.device).unsqueeze(-1), run, run.shape[2])
    buffers = _gathered(state, slots, state.length - stored, spec)
    observed = state.observed
    if observed is not None and observed.weights is not None:
        observed = observed._replace(weights=_gathered_weights(observed.weights, chosen, sinks, cached, keep))
    lease = buffers.lease
    return state._replace(
        buffers=buffers,
        offset=stored,
        stored=stored,
        start=_of_rows(dropping, stored, state.start),
        version=object() if lease is None else lease.holder,
        kept=KeptTokens(ordinary(kept), first, end),
        observed=observed,
    )


def check_observed(by: AnyPolicy, observed: Observed | None) -> None:
    """Raises CacheStateError where a policy needs queries or weights that were not kept."""
    needs, have = Needs.of(by), NOTHING if observed is None else observed.needs
    if needs.queries > have.queries or needs.weights > have.weights:
        raise CacheStateError(
            f"kv_cache: expected one that keeps what {shown(by)} needs of earlier queries, got one whose tokens were "
            "read without that; give the policy before the prompt, as cache_budget=(tokens, policy) of the module or "
            "of enable_cache"
        )


def _scores(by: AnyPolicy, shown_tokens: KeysAndValues, positions: Tensor, observed: Observed | None) -> Tensor:
    """The checked scores [B, G, S] of the policy, without a graph."""
    needs, given, (keys, values) = Needs.of(by), {}, shown_tokens
    if observed is not None and observed.queries is not None and needs.queries:
        given["queries"] = observed.queries[:, :, -needs.queries :]
    if observed is not None and observed.weights is not None and needs.weights:
        given["weights"] = observed.weights
    with torch.no_grad():
        scores: object = by(keys.detach(), values.detach(), positions=positions, **given)
    if not isinstance(scores, Tensor):
        raise ArgumentError(f"by: expected it to give a tensor of scores [B, G, S], got {type(scores).__name__}")
    if scores.shape != positions.shape:
        raise ShapeError(f"by: expected scores [B, G, S] = {list(positions.shape)}, got {list(scores.shape)}")
    if not scores.is_floating_point():
        raise DtypeError(f"by: expected scores of a float dtype, got {scores.dtype}")
    if scores.device != positions.device:
        raise DeviceError(f"by: expected scores on {positions.device}, as the keys, got them on {scores.device}")
    return scores.detach()


def _highest(scores: Tensor, sinks: int, cached: Lengths, number: int) -> Tensor:
    """int64 [B, G, number]: the columns of the highest scores, in order, sinks aside; of equal scores the newest.

    In a row with fewer tokens they mean nothing.
    """
    column = torch.arange(sinks, scores.shape[2], device=scores.device)
    cost = (-scores).masked_fill(scores.isnan(), float("inf"))[:, :, sinks:]
    if cached.uniform and number == len(column) - 1:
        # A step beyond a budget, without a sort: the first of the worst is dropped.
        return column[:-1] + (column[:-1] >= cost.argmax(2, keepdim=True) + sinks)
    # Sorted from the best, and NaN behind all others: columns without a token.
    absent = column >= cached.column(scores.device)
    order = cost.masked_fill(absent.unsqueeze(1), float("nan")).flip(2).sort(dim=2, stable=True).indices
    return (scores.shape[2] - 1 - order[:, :, :number]).sort(dim=2).values


def _gathered(state: SelfAttentionState, slots: Tensor, count: Lengths, spec: CacheSpec) -> KVBuffers:
    """Buffers with each row's `count` tokens from `slots` [B, G, width]; with a graph where that is carried on."""
    buffers = state.buffers
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in buffers.tensors):
        return KVBuffers.of((*_vectors(buffers, slots, count), *buffers.tensors[2:]))
    capacity = spec.room(slots.shape[2], 0, state.window)
    # Whole buffers in one pass: what uniform rows have behind their tokens is not read.
    with torch.inference_mode(False), torch.no_grad():
        tensors = [*_vectors(buffers, padded(slots, capacity), count), *(each.clone() for each in buffers.tensors[2:])]
    return KVBuffers.of(tensors, Lease(object(), zero_beyond=not count.uniform), buffers.coding)


def _vectors(buffers: KVBuffers, slots: Tensor, count: Lengths) -> list[Tensor]:
    """Keys and values in `slots` [B, G, width], with zeros after each row's `count` where rows differ."""
    batch, groups, width = slots.shape
    after = torch.arange(width, device=slots.device) >= count.column(slots.device)
    head = torch.arange(batch * groups, device=slots.device).view(batch, groups, 1)
    # Vectors of all heads in one run: six times as fast as a gather of numbers.
    index = (head * buffers.capacity + slots.masked_fill(after.unsqueeze(1), 0)).flatten()
    taken = (each.flatten(0, 2).index_select(0, index).view(batch, groups, width, -1) for each in buffers.tensors[:2])
    return [each if count.uniform else each.masked_fill(after[:, None, :, None], 0) for each in taken]


def _gathered_weights(weights: Tensor, chosen: Tensor, sinks: int, cached: Lengths, keep: int) -> Tensor:
    """The summed weights [B, G, S] of the tokens that stay: sinks and `chosen` ones, or whole rows."""
    count = cached.minimum(keep)
    run = _run(Lengths((0,)), max(count), chosen)
    columns = torch.cat((run[..., :sinks].expand(*chosen.shape[:2], -1), chosen), 2)
    dropping = [number > keep for number in cached.expand(weights.shape[0])]
    columns = _in_rows(dropping, columns, run, max(count))
    after = run >= count.column(weights.device).unsqueeze(1)
    return ordinary(weights.gather(2, columns).masked_fill(after, 0.0))


def _run(first: Lengths, width: int, like: Tensor) -> Tensor:
    """int64 [1 or B, 1, width]: numbers that follow each row's `first`."""
    return (first.column(like.device) + torch.arange(width, device=like.device)).unsqueeze(1)


def _of_rows(dropping: Sequence[bool], new: Lengths, old: Lengths) -> Lengths:
    """The new numbers of the rows that drop tokens, the old ones of the others."""
    pairs = zip(new.expand(len(dropping)), old.expand(len(dropping)), strict=True)
    return Lengths.of(new if drops else old for drops, (new, old) in zip(dropping, pairs, strict=True))


def _in_rows(dropping: Sequence[bool], new: Tensor, old: Tensor, width: int, unused: int = 0) -> Tensor:
    """`new` [B, G, ...] in the rows that drop tokens, `old` [1 or B, 1 or G, ...] in the others: [B, G, width]."""
    if all(dropping):
        return new
    rows = torch.tensor(dropping, device="cpu").to(new.device, non_blocking=True)[:, None, None]
    return padded(new, width, unused).where(rows, padded(old, width, unused))
