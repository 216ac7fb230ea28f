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
from .shapes import Model

KIND = "Long prompt"
ONE_SHOT = "ours, one shot"
PEAK, PEAK_OF_ONE_SHOT, CACHE = "peak above the weights, MiB", "peak of one shot, MiB", "cache, MiB"
PROGRAM = "long_prompt_process.py"


def cases(grid: Grid) -> Iterator[Case]:
    """Without a window and with one. On the CPU, whose memory is that of the process."""
    if grid.device == "cpu":
        tokens, longest = grid.long_prompt
        for window in (0, longest):
            work = partial(setup, grid.llama, tokens, window)
            yield Case(KIND, {"tokens": tokens, "window": window}, work, weight=30)


def setup(model: Model, tokens: int, window: int) -> Setup:
    """The model in float32; both ways make the same tokens."""
    shape, options = decoder_options(model)
    if window:
        options |= {"window_size": window}
    peaks: dict[str, list[float]] = {PEAK: [], PEAK_OF_ONE_SHOT: []}
    processes: list[OwnProcess] = []

    def reading(name: str, **generation: Any) -> Candidate:
        given = shape, options, tokens, torch.get_num_threads(), generation
        process = OwnProcess(PROGRAM, json.dumps(given))
        processes.append(process)
        return Candidate(lambda: peaks[name].append(process.ask()))

    def close() -> None:
        for process in processes:
            process.close()

    return Setup(
        reading(PEAK),
        others={ONE_SHOT: reading(PEAK_OF_ONE_SHOT, prefill_chunk_size=tokens)},
        tokens=tokens,
        details=lambda: {
            **{name: max(found) for name, found in peaks.items() if found},
            CACHE: cache_mib(model, tokens, window),
        },
        close=close,
    )


def cache_mib(model: Model, tokens: int, window: int) -> float:
    """MiB of the keys and values that the model caches after the prompt; over a window up to two and some slack."""
    head_dim = model.head_dim or model.d_model // model.num_heads
    slots = 2 * window + 64 if window else tokens + 16
    return 2 * model.num_layers * model.num_groups * head_dim * slots * 4 / 2**20
