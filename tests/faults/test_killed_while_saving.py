"""A process killed while it saves a conversation leaves the old file or the new one, never a torn one."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.blocks.stacks import MIXED, make, moments
from tests.setups import tokens
from transformer import KVCache

KILLS = 40


def said(seed: int, length: int) -> KVCache:
    stack = make(MIXED)
    with torch.no_grad():
        stack(tokens(2, length, 16, seed=seed))
    return KVCache.from_model(stack).remove(stack)


def content(cache: KVCache) -> list[object]:
    stack = make(MIXED)
    cache.install(stack)
    found = moments(stack)
    cache.remove(stack)
    return found


def save_for_ever(caches: list[KVCache], path: Path, begun: int) -> None:
    """In the child: says through the pipe `begun` that it has saved once, and goes on until it is killed."""
    try:
        while True:
            for cache in caches:
                cache.save(path)
                if begun >= 0:
                    os.write(begun, b"!")
                    begun = -1
    finally:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the child is a fork, which costs no second import of torch")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    """Two conversations of different sizes in turns onto one path, and SIGKILL after a random while: what stands there
    loads, and is one of the two, bit for bit. Unfinished files may lie beside it, under names of their own."""
    path, caches = tmp_path / "chat.safetensors", [said(1, 9), said(2, 400)]
    expected = [content(cache) for cache in caches]
    seconds, found, beside = random.Random(0), [0, 0], 0
    # One thread: a fork takes only the calling thread along, and a pool would wait for the others.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(KILLS):
            reading, begun = os.pipe()
            child = os.fork()
            if child == 0:
                save_for_ever(caches, path, begun)
            os.close(begun)
            assert os.read(reading, 1) == b"!", "the child saves"
            os.close(reading)
            time.sleep(seconds.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            found[expected.index(content(KVCache.load(path)))] += 1
            others = [entry for entry in tmp_path.iterdir() if entry != path]
            beside += len(others)
            for other in others:
                other.unlink()
    finally:
        torch.set_num_threads(threads)
    sys.stdout.write(f"{KILLS} kills: {found} whole files of either kind, 0 torn, {beside} unfinished ones beside\n")
    assert sum(found) == KILLS
    assert min(found) > 0
    assert beside > 0, "some kills came while a file was being written"
