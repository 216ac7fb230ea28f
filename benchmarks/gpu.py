"""Command of the GPU grid: `python -m benchmarks.gpu PART --folder FOLDER`, part by part in `benchmarks/gpu.sh`.

A part writes FOLDER/PART.json, with the device, the bandwidth of a copy in the same run, and a row for each point
(until it is done FOLDER/PART.partial.json). The part `page` writes FOLDER/page.md of all of them: tables, shares of
that bandwidth, and bars.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .gpu_parts import KERNEL, OURS, Place, Row, decode, prefill
from .gpu_steps import COMPILED, steps
from .timing import processor

PARTS = {"decode": decode, "prefill": prefill, "steps": steps}
POINT = ("rows", "keys", "G", "tokens", "window", "step", "parameters", "bytes", "left out")
"""Names of a row that are no candidates."""

SHARE, LONG, LEVEL = 0.7, 16384, 1.03
"""Share of the copy's bandwidth that bars ask for, keys from which on they ask for it, and how far ahead is level."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one part, or writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "page"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which check the script")
    parser.add_argument("--seconds", type=float, default=60.0, help="no point begins later")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.part == "page":
        text = page({name: _read(given.folder, name) for name in PARTS}, given.folder / "tests.log")
        (given.folder / "page.md").write_text(text, encoding="utf-8")
        print(text)
        return
    run(given.part, given.folder, Place(given.device, given.quick, time.monotonic() + given.seconds))


@torch.inference_mode()
def run(part: str, folder: Path, place: Place) -> dict[str, Any]:
    """Runs a part and writes its file."""
    torch.manual_seed(0)
    began = time.monotonic()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if place.cuda else processor(),
        "quick": place.quick,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "Python": platform.python_version(),
        "bandwidth": place.bandwidth(),
        "rows": [],
    }
    partial = folder / f"{part}.partial.json"
    for row in PARTS[part](place):
        result["rows"].append(row)
        result["seconds"] = time.monotonic() - began
        print(json.dumps(row), flush=True)
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / f"{part}.json")
    return result


def _read(folder: Path, part: str) -> dict[str, Any] | None:
    """The result of a part, or as much as it came to."""
    paths = [path for path in (folder / f"{part}.json", folder / f"{part}.partial.json") if path.exists()]
    return json.loads(paths[0].read_text(encoding="utf-8")) if paths else None


def page(parts: dict[str, dict[str, Any] | None], tests: Path) -> str:
    """The page of all parts that have run, in Markdown."""
    ran = {name: result for name, result in parts.items() if result is not None}
    devices = sorted({result["device"] for result in ran.values()})
    lines = [f"# On {', '.join(devices) or 'no device'}", ""]
    if any(result["quick"] for result in ran.values()):
        lines += ["Tiny sizes, which check the script: no measurement.", ""]
    lines += [
        "Microseconds of a call, the median of bursts; `x`: the time of another as a multiple of ours; share: the",
        "bytes of the point over our time, as a part of the bandwidth of a copy in the same run (what it reads and",
        "writes together). Keys that fit a card's cache are read from there, so a share can be above 1.",
        "",
    ]
    log = tests.read_text(encoding="utf-8").strip().splitlines() if tests.exists() else ["not run"]
    lines += [f"Device tests: {log[-1]}", ""]
    for name, result in parts.items():
        lines += [f"## {name}", ""]
        if result is None:
            lines += ["Not run.", ""]
            continue
        lines += [f"{result['bandwidth'] / 1e9:,.0f} GB/s of a copy, {result['seconds']:.0f} s in all.", ""]
        lines += [*_table(result), ""]
    lines += ["## Bars", "", "| bar | points | reached |", "| --- | --- | --- |"]
    for name, count, missed in bars(ran):
        lines.append(f"| {name} | {count} | {'no: ' + '; '.join(missed) if missed else 'yes'} |")
    return "\n".join(lines) + "\n"


def _ours(row: Row) -> tuple[str, float] | None:
    """The name and the seconds of our candidate; None if it has none."""
    name = KERNEL if KERNEL in row else OURS
    seconds = row.get(name)
    return (name, seconds) if isinstance(seconds, float) else None


def _peers(row: Row) -> dict[str, float]:
    own = (*POINT, KERNEL, OURS)
    return {name: value for name, value in row.items() if name not in own and isinstance(value, float)}


def share(row: Row, bandwidth: float) -> float | None:
    """The bytes of a point over our time, as a part of the bandwidth."""
    ours = _ours(row)
    return None if ours is None or "bytes" not in row else row["bytes"] / ours[1] / bandwidth


def bars(ran: dict[str, dict[str, Any]]) -> list[tuple[str, int, list[str]]]:
    """Each bar, how many points it asks, and those that miss it, with their figures."""
    found: dict[str, tuple[int, list[str]]] = {}

    def note(name: str, missed: str | None) -> None:
        count, those = found.get(name, (0, []))
        found[name] = count + 1, those if missed is None else [*those, missed]

    for part, result in ran.items():
        for row in result["rows"]:
            point = ", ".join(f"{name} {row[name]}" for name in POINT[:6] if name in row)
            if "left out" in row:
                continue
            ours, reached = _ours(row), share(row, result["bandwidth"])
            if ours is None:
                note("everything of ours runs", f"{part}, {point}: {row.get(KERNEL, row.get(OURS))}")
                continue
            note("everything of ours runs", None)
            asked = (part == "decode" and row["keys"] >= LONG) or row.get("step") == COMPILED
            if asked and reached is not None:
                name = f"{part}: at least {SHARE:.0%} of the copy's bandwidth"
                note(name, None if reached >= SHARE else f"{point}: {reached:.0%}")
            for peer, seconds in _peers(row).items():
                ahead = ours[1] / seconds
                note("no peer is ahead", None if ahead <= LEVEL else f"{part}, {point}: {peer} by {ahead:.2f}")
    return [(name, count, missed) for name, (count, missed) in found.items()]


def _table(result: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name for row in result["rows"] for name in row))
    points, others = [name for name in POINT if name in names], [name for name in names if name not in POINT]
    head = [*points, *others, "share"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for row in result["rows"]:
        ours, reached = _ours(row), share(row, result["bandwidth"])
        cells = [f"{row[name]:,}" if isinstance(row.get(name), int) else str(row.get(name, "")) for name in points]
        for name in others:
            value = row.get(name, "")
            if isinstance(value, float):
                times = "" if ours is None or name == ours[0] else f" ({value / ours[1]:.2f}x)"
                value = f"{value * 1e6:,.1f}{times}"
            cells.append(value)
        lines.append(f"| {' | '.join([*cells, '' if reached is None else f'{reached:.0%}'])} |")
    return lines


if __name__ == "__main__":
    main()
