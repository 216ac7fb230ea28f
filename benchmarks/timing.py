"""Medians of candidates that are measured in turn, so that drift of the machine affects all of them equally."""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

Candidate = Callable[[], object]


def medians(candidates: dict[str, Candidate], rounds: int, label: str = "", burst: int = 5) -> dict[str, float]:
    """Median seconds of each candidate over `rounds` turns of `burst` calls in a row, after two turns of warm-up.

    A burst is like decoding: the same work repeatedly. Its first call, which finds another candidate's data in
    the CPU's cache, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in tqdm(range(rounds + 2), desc=label, leave=False, disable=not label):
        for name, run in candidates.items():
            for call in range(burst):
                began = time.perf_counter()
                run()
                if turn >= 2 and (call > 0 or burst == 1):
                    seconds[name].append(time.perf_counter() - began)
    gc.collect()
    return {name: statistics.median(values) for name, values in seconds.items()}


def reading(*tensors: torch.Tensor) -> Candidate:
    """Reads tensors once, which is the limit by memory bandwidth."""
    return lambda: [tensor.sum() for tensor in tensors]


def print_table(title: str, head: list[str], body: list[list[str]]) -> None:
    """Prints a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    print(f"\n{title}\n")
    for row in [head, ["-" * width for width in widths], *body]:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def microseconds(seconds: float) -> str:
    """Seconds as whole microseconds."""
    return f"{seconds * 1e6:,.0f}"


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
