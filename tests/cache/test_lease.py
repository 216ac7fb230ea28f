"""Lease of buffers: only the newest state appends in place, and no slot that others can read is rewritten."""

from __future__ import annotations

import threading

import torch

from transformer.cache.buffers import KVBuffers
from transformer.cache.lease import Lease, exchange

FIRST, SECOND = object(), object()


def test_a_state_acquires_it_once() -> None:
    lease = Lease(FIRST)
    assert not lease.acquire(SECOND)
    assert lease.is_held_by(FIRST)
    assert lease.acquire(FIRST)
    assert not lease.acquire(FIRST), "a write is under way, or has failed"
    assert not lease.is_held_by(FIRST)


def test_a_write_renews_it_for_the_next_state() -> None:
    lease = Lease(FIRST)
    assert lease.acquire(FIRST)
    changes = lease.renew(SECOND)
    assert not lease.acquire(SECOND), "nothing has happened before the exchange"
    exchange((), changes)
    assert not lease.acquire(FIRST)
    assert lease.acquire(SECOND)


def test_a_truncated_state_gets_it_where_nobody_else_reads() -> None:
    lease = Lease(FIRST)
    lease.share(5)
    lease.share(3)
    assert lease.renew(SECOND, FIRST, 4) == []
    assert lease.renew(SECOND, SECOND, 5) == [], "the state before had it not"
    lease.open(8)
    assert lease.renew(SECOND, FIRST, 7) == []
    lease.close()
    exchange((), lease.renew(SECOND, FIRST, 5))
    assert lease.is_held_by(SECOND)
    assert not lease.clean, "truncated tokens lie beyond it"


def test_an_empty_buffer_gives_it_to_the_state_that_is_published() -> None:
    lease = Lease()
    assert lease.clean
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
