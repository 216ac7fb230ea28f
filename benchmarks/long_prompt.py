"""Long prompt: time and peak memory of a whole model that reads 12,000 tokens, in chunks and in one shot.

Each way has a process of its own, since the peak is that of a whole process (`VmHWM` of /proc/self/status, Linux).
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .case import Candidate, Case, Setup
from .grid import Grid
from .our_models import decoder_options
from .own_process import OwnProcess
from .shapes import LLAMA_135M

KIND = "Long prompt"
ONE_SHOT = "ours, one shot"
PEAK, PEAK_OF_ONE_SHOT, CACHE = "peak above the weights, MiB", "peak of one shot, MiB", "cache, MiB"
TOKENS = 12_000
WINDOW = 1024
PROGRAM = "long_prompt_process.py"


def cases(grid: Grid) -> Iterator[Case]:
    """Without a window and with one. On the CPU, whose memory is that of the process."""
    if grid.device == "cpu":
        for window in (0, WINDOW):
            yield Case(KIND, {"tokens": TOKENS, "window": window}, partial(setup, window), weight=30)


def setup(window: int) -> Setup:
    """The 135M shape in float32; both ways make the same tokens."""
    shape, options = decoder_options(LLAMA_135M)
    if window:
        options |= {"window_size": window}
    peaks: dict[str, list[float]] = {PEAK: [], PEAK_OF_ONE_SHOT: []}
    processes: list[OwnProcess] = []

    def reading(name: str, **generation: Any) -> Candidate:
        given = shape, options, TOKENS, torch.get_num_threads(), generation
        process = OwnProcess(PROGRAM, json.dumps(given))
        processes.append(process)
        return Candidate(lambda: peaks[name].append(process.ask()))

    def close() -> None:
        for process in processes:
            process.close()

    return Setup(
        reading(PEAK),
        others={ONE_SHOT: reading(PEAK_OF_ONE_SHOT, prefill_chunk_size=TOKENS)},
        tokens=TOKENS,
        details=lambda: {name: max(found) for name, found in peaks.items() if found} | {CACHE: cache_mib(window)},
        close=close,
    )


def cache_mib(window: int) -> float:
    """MiB of the keys and values that the model caches after the prompt; over a window up to two and some slack."""
    model = LLAMA_135M
    head_dim = model.head_dim or model.d_model // model.num_heads
    slots = 2 * window + 64 if window else TOKENS + 16
    return 2 * model.num_layers * model.num_groups * head_dim * slots * 4 / 2**20
