"""Several processes on one card: `torchrun -m benchmarks.parallel_gpu BACKEND --folder FOLDER`, and their page.

`benchmarks/parallel_gpu.sh` runs one rank of NCCL and two of gloo. A run writes FOLDER/BACKEND-RANKS.json with a row
for each point, or the reason where a part of it fails. The part `page` writes FOLDER/page.md of all of them.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .gpu_parts import Place
from .parallel_parts import collectives, shared_sequence, tensor_parallel
from .timing import processor

PARTS = (collectives, tensor_parallel, shared_sequence)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs this rank's part of a run, or writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel_gpu", description=__doc__)
    parser.add_argument("part", choices=["nccl", "gloo", "page"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which check the script")
    given = parser.parse_args(arguments)
    if given.part == "page":
        text = page([json.loads(path.read_text("utf-8")) for path in sorted(given.folder.glob("*-*.json"))])
        (given.folder / "page.md").write_text(text, encoding="utf-8")
        print(text)
        return
    if given.device == "cuda":
        # One card for all ranks, or one for each where there are as many.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    dist.init_process_group(given.part)
    run(given.folder, Place(given.device, given.quick))
    dist.destroy_process_group()


@torch.inference_mode()
def run(folder: Path, place: Place) -> None:
    """All points of this run; rank 0 writes its file."""
    torch.manual_seed(0)
    began = time.monotonic()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if place.cuda else processor(),
        "backend": dist.get_backend(),
        "ranks": ranks,
        "quick": place.quick,
        "torch": torch.__version__,
        "rows": [],
    }
    mesh = init_device_mesh(place.device, (ranks,))
    for part in PARTS:
        rows = []
        try:
            rows += part(place, mesh)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            rows.append({"part": part.__name__, "failed": f"{type(error).__name__}: {reason}"})
        result["rows"] += rows
        if rank == 0:
            print(*map(json.dumps, rows), sep="\n", flush=True)
    result["seconds"] = time.monotonic() - began
    if rank == 0:
        file = folder / f"{result['backend']}-{ranks}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The page of all runs, in Markdown."""
    lines = [f"# Several processes on {', '.join(sorted({run['device'] for run in runs})) or 'no device'}", ""]
    if any(run["quick"] for run in runs):
        lines += ["Tiny sizes, which check the script: no measurement.", ""]
    for run in runs:
        lines += [f"## {run['ranks']} of {run['backend']}, torch {run['torch']}, {run['seconds']:.0f} s", ""]
        tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in run["rows"]:
            tables.setdefault(tuple(row), []).append(row)
        for names, rows in tables.items():
            lines += [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
            lines += [f"| {' | '.join(_shown(name, row[name]) for name in names)} |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float) and name.endswith(" us"):
        return f"{value * 1e6:,.1f}"
    if isinstance(value, float):
        return f"{value:.2e}" if 0.0 < abs(value) < 1.0 else f"{value:,.0f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
