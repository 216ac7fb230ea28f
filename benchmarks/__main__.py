"""Command of the benchmarks, which measures all points of a grid: `python -m benchmarks [NAME ...]`."""

import argparse
import datetime
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from . import (
    batching,
    checkpoints,
    chunks,
    coded_keys,
    compiled,
    decode_step,
    exactness,
    generation,
    host_time,
    importing,
    loading,
    long_prompt,
    models,
    padded,
    prefill,
    ragged,
    recomputing,
    released,
    report,
    shared_prefix,
    speculative,
    stack,
    stored_caches,
    streaming,
    tensor_parallel,
    their_models,
    training,
    umt5,
    usage,
    windowed_prefill,
)
from .bars import all_bars, peer_is_ahead
from .before import exported
from .case import Case
from .grid import FULL, QUICK, Grid
from .plots import draw
from .runner import Measured, measure

KINDS = {
    "decode_step": decode_step.cases,
    "coded_keys": coded_keys.cases,
    "shared_prefix": shared_prefix.cases,
    "stored_caches": stored_caches.cases,
    "chunks": chunks.cases,
    "prefill": prefill.cases,
    "windowed_prefill": windowed_prefill.cases,
    "streaming": streaming.cases,
    "training": training.cases,
    "ragged": ragged.cases,
    "models": models.cases,
    "released": released.cases,
    "padded": padded.cases,
    "usage": usage.small_cases,
    "usage_large": usage.large_cases,
    "host_time": host_time.cases,
    "exactness": exactness.cases,
    "generation": generation.cases,
    "long_prompt": long_prompt.cases,
    "speculative": speculative.cases,
    "recomputing": recomputing.cases,
    "batching": batching.cases,
    "stack": stack.cases,
    "tensor_parallel": tensor_parallel.cases,
    "importing": importing.cases,
}

TABLES = {
    "checkpoints": checkpoints.run,
    "loading": loading.run,
    "umt5": umt5.run,
    "compiled": compiled.run,
    "their_models": their_models.run,
}
"""What is loaded from files or compiled, printed where it is named: no part of the page."""

MOST_NAMED = 8
"""Parts that the name of a page lists: a name of all of them is longer than a file may have."""

LATE = 0.5
"""Part of the whole time by which the timetable may be missed before rounds are cut."""


def main() -> None:
    """Runs the comparisons named on the command line, or all of them, and writes a dated page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", choices=[[], *KINDS, *TABLES], help="kinds to measure; all of the page by default"
    )
    parser.add_argument("--quick", action="store_true", help="fewer points and less time for each")
    parser.add_argument("--before", metavar="REV", help="a commit whose library stands beside the others")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: everything in bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the page")
    arguments = parser.parse_args()
    grid = QUICK if arguments.quick else FULL
    if arguments.device == "cuda":
        grid = replace(grid, device="cuda", dtypes=("bfloat16",))
    kinds = [name for name in arguments.names if name in KINDS]
    if kinds or not arguments.names:
        with exported(arguments.before) as before:
            grid = replace(grid, before=before)
            run(grid, kinds, arguments.output, arguments.threads, arguments.seed, arguments.before)
    torch.set_num_threads(arguments.threads)
    for name in arguments.names:
        if name in TABLES:
            TABLES[name]()


def run(
    grid: Grid, names: Sequence[str], output: Path, threads: int = 2, seed: int = 0, before: str | None = None
) -> list[Measured]:
    """Measures, prints, and writes page, JSON and pictures into the folder `output`; `before` names `grid.before`."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    facts, day = report.machine(grid, threads), datetime.date.today().isoformat()
    facts |= {} if before is None else {"before": before}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results = measure_all([case for name in names or KINDS for case in KINDS[name](grid)], grid, grid.second)
    bars = all_bars(results)
    if names:
        bars = [bar for bar in bars if bar.reached is not None]
    print("", *report.bar_table(bars), sep="\n")
    output.mkdir(parents=True, exist_ok=True)
    named = names if len(names) <= MOST_NAMED else [f"{len(names)}_parts"]
    path = output / "-".join([day, grid.device, *([] if grid.name == FULL.name else [grid.name]), *named])
    pictures = draw(results, path)
    path.with_name(f"{path.name}.json").write_text(report.as_json(results, bars, facts, day) + "\n", encoding="utf-8")
    path.with_name(f"{path.name}.md").write_text(report.page(results, bars, facts, day, pictures), encoding="utf-8")
    print(f"\nwritten: {path}.md, .json and {len(pictures)} pictures")
    return results


def measure_all(cases: Sequence[Case], grid: Grid, second: float) -> list[Measured]:
    """Measures each case in `second` times its weight; prints the table of a kind when it is complete."""
    began, due = time.perf_counter(), 0.0
    planned = second * sum(case.weight for case in cases)
    results: list[Measured] = []
    bar = tqdm(cases, unit="case", dynamic_ncols=True)
    for index, case in enumerate(bar):
        bar.set_description(f"{case.kind}: {', '.join(f'{name} {value}' for name, value in case.point.items())}")
        late = time.perf_counter() - began - due
        due += case.weight * second
        # A run that is late measures one round per case until it is on time; the tables show the rounds.
        hurry = late > LATE * planned
        share = case.weight * second - max(late, 0.0)
        measured = measure(case, share, grid.device, hurry=hurry)
        if peer_is_ahead(measured):
            measured = measure(case, share, grid.device, hurry=hurry, again=True)
        results.append(measured)
        if case.kind not in {other.kind for other in cases[index + 1 :]}:
            done = [each for each in results if each.kind == case.kind]
            bar.write("\n".join(["", case.kind, "", *report.table(done)]))
    return results


if __name__ == "__main__":
    main()
