"""Runs of a function in several processes that PyTorch joins, on this machine."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(number: int, function: Callable[..., None], *arguments: Any, seconds: float = 300.0) -> None:
    """Runs `function(rank, *arguments)` in so many processes joined by gloo; raises the error of a rank that fails.

    The function is at the top of a module, since each process imports it anew. A process takes seconds to begin: one
    run does well to check much.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        processes = torch.multiprocessing.spawn(
            _rank, (number, function, meeting, seconds, arguments), nprocs=number, join=False
        )
        end = time.monotonic() + seconds
        # `join` returns after the first process that ends, and raises what it raised.
        while not processes.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() > end:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__}: {number} ranks were not done after {seconds:g} s")


def _rank(
    rank: int, number: int, function: Callable[..., None], meeting: str, seconds: float, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=number, timeout=timedelta(seconds=seconds)
    )
    try:
        function(rank, *arguments)
        dist.barrier()
    finally:
        # A rank that raised does not wait for the others, which may hang in a collective of their own.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()
