"""Lease of buffers: only the newest state appends in place, and no slot that others can read is rewritten."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import torch

from transformer import KVCache
from transformer.cache.buffers import KVBuffers
from transformer.cache.lease import Lease, exchange
from transformer.cache.lengths import Lengths
from transformer.cache.rearrange import lease_of_truncated, truncated
from transformer.cache.state import SelfAttentionState

FIRST, SECOND = object(), object()


def test_a_state_acquires_it_once() -> None:
    lease = Lease(FIRST)
    assert not lease.acquire(SECOND)
    assert lease.holder is FIRST
    assert lease.acquire(FIRST)
    assert not lease.acquire(FIRST), "a write is under way, or has failed"
    assert lease.holder is None


def test_a_write_renews_it_for_the_next_state() -> None:
    lease = Lease(FIRST)
    assert lease.acquire(FIRST)
    changes = lease.renew(SECOND)
    assert not lease.acquire(SECOND), "nothing has happened before the exchange"
    exchange((), changes)
    assert not lease.acquire(FIRST)
    assert lease.acquire(SECOND)


def test_slots_are_shared_for_good_or_until_a_stack_is_closed() -> None:
    lease = Lease(FIRST)
    assert lease.shared == 0
    lease.share(5)
    lease.share(3)
    assert lease.shared == 5
    first, second = ExitStack(), ExitStack()
    lease.share(8, until=first)
    lease.share(6, until=second)
    assert lease.shared == 8
    first.close()
    assert lease.shared == 6, "transactions may end in any order"
    second.close()
    assert lease.shared == 5, "a fork never ends it"
    assert lease.holder is FIRST


def states(lease: Lease, length: int, after: int) -> tuple[SelfAttentionState, SelfAttentionState]:
    """The state that holds a lease, and what a truncation makes of it."""
    slots = torch.zeros(1, 1, 10, 2)
    lengths = Lengths((0,)), Lengths((0,)), Lengths((length,))
    before = SelfAttentionState.compact(KVBuffers.of([slots, slots], lease), *lengths, None)
    return before, truncated(before, Lengths((after,)))


def test_a_truncated_state_gets_it_where_no_other_state_reads() -> None:
    lease = Lease(FIRST)
    before, after = states(lease, 8, 5)
    assert before.version is FIRST
    lease.share(6)
    assert lease_of_truncated(before, after) == []
    lease = Lease(FIRST)
    before, after = states(lease, 8, 5)
    lease.share(5)
    with ExitStack() as stack:
        lease.share(8, until=stack)
        assert lease_of_truncated(before, after) == []
    assert lease.zero_beyond
    assert lease_of_truncated(before._replace(version=SECOND), after) == [], "the state before had it not"
    assert lease_of_truncated(states(Lease(FIRST), 8, 5)[0], after) == [], "other buffers"
    exchange((), lease_of_truncated(before, after))
    assert lease.holder is after.version
    assert not lease.zero_beyond, "truncated tokens lie beyond it"


@torch.no_grad()
def test_a_transaction_shares_slots_while_it_is_open() -> None:
    cache = KVCache(num_layers=1, num_kv_heads=1, head_dim=2)

    def place_after(length: int) -> int:
        """The address of the keys after `length` more tokens."""
        return cache.update(0, "self", *torch.ones(2, 1, 1, length, 2))[0].data_ptr()

    first = place_after(5)
    with cache.transaction():
        assert place_after(1) == first
    cache.truncate(3)
    assert place_after(2) == first, "the transaction is over, so its first state is read no more"
    with cache.transaction():
        cache.truncate(3)
        assert place_after(2) != first, "an exception would need the slots as they were"


def test_an_empty_buffer_gives_it_to_the_state_that_is_published() -> None:
    lease = Lease()
    assert lease.zero_beyond
    assert not lease.acquire(FIRST)
    exchange((), lease.renew(FIRST))
    assert lease.acquire(FIRST)


def test_one_of_many_threads_gets_it() -> None:
    for _ in range(50):
        lease, start, got = Lease(FIRST), threading.Barrier(4), []

        def run(lease: Lease = lease, start: threading.Barrier = start, got: list[bool] = got) -> None:
            start.wait()
            got.append(lease.acquire(FIRST))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False, False, False, True]


def test_buffers_of_changed_tensors_have_no_lease() -> None:
    tensors = [torch.full((1, 1, 2, 3), float(number)) for number in range(4)]
    buffers = KVBuffers.of(tensors, Lease(FIRST))
    assert buffers.tensors == tuple(tensors)
    assert (buffers.capacity, buffers.nbytes) == (2, 4 * 6 * 4)
    changed = buffers.mapped(lambda tensor: tensor + 1)
    assert changed.lease is None
    assert [int(tensor.max()) for tensor in changed.tensors] == [1, 2, 3, 4]
    assert KVBuffers.of(tensors[:2]).sink_key is None
