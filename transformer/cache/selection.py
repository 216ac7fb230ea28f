"""Selection of rows of a state: kept, reordered and repeated. Repeated rows share their tokens as a prefix."""

from collections.abc import Sequence
from dataclasses import replace

from ..kernels import tuning
from .buffers import KVBuffers, changed, empty_slots
from .lease import Lease
from .lengths import EMPTY, Lengths, on_device
from .shared_prefix import SharedPrefix
from .state import SelfAttentionState


def selected(state: SelfAttentionState, chosen: Sequence[int], *, share: bool) -> SelfAttentionState:
    """The state of these rows, in this order, repeated where they are repeated; with a graph where it carries one.

    With `share`, repeated rows keep one copy of their tokens, if that saves bytes enough. Rows that have a prefix keep
    it as long as two of them have the same; else each has its tokens whole again.
    """
    distinct = list(dict.fromkeys(chosen))
    if state.prefix is None:
        shares = share and _may_share(state) and _saves_enough_bytes(state, distinct, chosen)
        return _sharing(state, distinct, chosen) if shares else _copied(state, chosen)
    if len({state.prefix.rows[row] for row in chosen}) == len(chosen):
        after = _copied(state, chosen)
        return after.whole(max(after.offset) + after.buffers.capacity)
    if share and _is_worth_regrouping(state, distinct, chosen):
        whole = _copied(state, distinct).whole()
        place = {row: number for number, row in enumerate(distinct)}
        return _sharing(whole, range(len(distinct)), [place[row] for row in chosen])
    return _copied(state, chosen)


def _copied(state: SelfAttentionState, chosen: Sequence[int]) -> SelfAttentionState:
    """The rows with a copy of their own tokens, and the prefix that they had."""
    buffers = state.buffers
    index = on_device(chosen, buffers.key.device)
    offset, stored, start, length = _numbers(state, chosen)
    fresh, version, lease = buffers.mapped(lambda tensor: tensor.index_select(0, index)), object(), buffers.lease
    if not fresh.key.requires_grad:
        # Tokens that other states have written beyond this one's were copied too.
        zero_beyond = lease is not None and lease.zero_beyond and lease.holder is state.version
        fresh = replace(fresh, lease=Lease(version, zero_beyond=zero_beyond))
    kept, observed, prefix = state.kept, state.observed, state.prefix
    state = state._replace(buffers=fresh, offset=offset, stored=stored, start=start, length=length, version=version)
    if kept is not None:
        state = state._replace(kept=kept.selected(chosen, index))
    if observed is not None:
        state = state._replace(observed=observed.selected(index, max(state.cached_lengths())))
    return state if prefix is None else state._replace(prefix=prefix.selected(chosen))


def _sharing(state: SelfAttentionState, distinct: Sequence[int], chosen: Sequence[int]) -> SelfAttentionState:
    """The rows with all of their tokens in a prefix, and no slot of their own yet."""
    buffers, batch, (length,) = state.buffers, state.buffers.key.shape[0], _numbers(state, chosen)[-1:]
    width, saved = max(length), _tokens(state, chosen) - _tokens(state, distinct)
    as_they_lie = list(distinct) == list(range(batch)) and (buffers.capacity - width) * batch <= saved
    if as_they_lie and buffers.lease is not None:
        # The state that holds the lease appends after these tokens, and writes none of them again.
        buffers.lease.share(width)
    index = on_device(distinct, buffers.key.device)
    key, value = (
        changed(lambda t: t[:, :, :width] if as_they_lie else t[:, :, :width].index_select(0, index), tensor)
        for tensor in buffers.tensors
    )
    number = {row: place for place, row in enumerate(distinct)}
    prefix = SharedPrefix(key, value, tuple(number[row] for row in chosen))
    version = object()
    slots = (empty_slots(tensor, 0, len(chosen)) for tensor in buffers.tensors)
    own = KVBuffers.of(slots, Lease(version), buffers.coding)
    return state._replace(
        buffers=own, offset=length, stored=length, start=length, length=length, version=version, prefix=prefix
    )


def _may_share(state: SelfAttentionState) -> bool:
    """Whether all tokens of a state without a prefix can become one."""
    buffers = state.buffers
    if buffers.sink_key is not None or buffers.key.requires_grad:
        return False
    if state.window is not None or state.kept is not None or state.observed is not None:
        return False
    return state.offset == state.start == state.stored == EMPTY


def _saves_enough_bytes(state: SelfAttentionState, distinct: Sequence[int], chosen: Sequence[int]) -> bool:
    """Whether one copy for each of the distinct rows saves bytes enough."""
    saved = _tokens(state, chosen) - _tokens(state, distinct)
    return saved > 0 and saved * state.buffers.key.shape[1] * state.buffers.slot_bytes >= tuning.active.min_shared_bytes


def _is_worth_regrouping(state: SelfAttentionState, distinct: Sequence[int], chosen: Sequence[int]) -> bool:
    """Whether rows that have a prefix share the tokens after it too: where that saves more than it copies."""
    own = state._replace(length=state.length - state.offset)
    copied, saved = _tokens(state, distinct), _tokens(own, chosen) - _tokens(own, distinct)
    return saved > copied and _saves_enough_bytes(own, distinct, chosen)


def _numbers(state: SelfAttentionState, chosen: Sequence[int]) -> tuple[Lengths, ...]:
    """Offset, stored, start and length of these rows."""
    batch = state.buffers.key.shape[0]
    numbers = (state.offset, state.stored, state.start, state.length)
    return tuple(Lengths.of(each.expand(batch)[row] for row in chosen) for each in numbers)


def _tokens(state: SelfAttentionState, rows: Sequence[int]) -> int:
    lengths = state.length.expand(state.buffers.key.shape[0])
    return sum(lengths[row] for row in rows)
