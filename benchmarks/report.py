"""Report of a run: tables in Markdown, and all results as JSON."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from transformer.kernels.compiled import are_available

from .bars import Bar
from .grid import Grid
from .intervals import Interval
from .runner import Measured
from .timing import processor

HOW = """\
Candidates take turns in one process: in each round every one works for a short burst, the limit of the machine among
them, in changing order. Times are medians; a ratio is the median over the rounds of the two times in one round, with a
95 % interval by order statistics in brackets (the whole range where rounds are fewer than six). The limit is the larger
of two times: reading the very buffers of that case once (GB/s), and the operations that the work needs at the rate of a
product of two 1024 x 1024 matrices in that dtype (GFLOP/s); which of them it was, the unit says. Points at which a peer
was ahead were measured a second time, and that one counts. An earlier version of the library works in a process of its
own, in turn with the others.
"""

OUT_OF_REACH = Path(__file__).parent / "out_of_reach.md"
"""What profiles of such points showed, and what did not help: written by hand, on the CPU."""


def machine(grid: Grid, threads: int) -> dict[str, str | int]:
    """The machine and the versions of a run."""
    facts: dict[str, str | int] = {
        "grid": grid.name,
        "device": torch.cuda.get_device_name() if grid.device == "cuda" else processor(),
        "cores": os.cpu_count() or 0,
        "threads": threads,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    facts |= {
        name: version(name) for name in ("torch", "transformers", "x-transformers", "ctranslate2", "torchao", "numba")
    }
    return {**facts, "compiled kernels": "used" if are_available() else "off", "commit": _commit()}


def table(results: Sequence[Measured]) -> list[str]:
    """The table of the cases of one kind, as lines of Markdown."""
    names = list(dict.fromkeys(name for each in results for name in each.seconds))
    point = list(dict.fromkeys(name for each in results for name in each.point))
    details = list(dict.fromkeys(name for each in results for name in each.details))
    head = [*point, *(f"{name}, ms" for name in names), "best peer / ours", "of the limit", "the machine"]
    held = [name for name in names if any(name in each.held for each in results)]
    head += [f"{name}, MB" for name in held]
    head += [*details, "rounds"]
    body = []
    for each in results:
        times = [_milliseconds(each.seconds[name].median) if name in each.seconds else "" for name in names]
        limit = "" if each.rate is None else f"{each.rate:,.0f} {each.rate_unit}"
        row = [*(_plain(each.point.get(name, "")) for name in point), *times]
        row += [_with_range(each.lead, "{:.2f}"), _with_range(each.share, "{:.0%}"), limit]
        row += [f"{each.held[name] / 1e6:,.1f}" if name in each.held else "" for name in held]
        row += [f"{each.details[name]:,.4g}" if name in each.details else "" for name in details]
        body.append([*row, f"{each.rounds}{' (again)' if each.again else ''}"])
    return _lines(head, body)


def bar_table(bars: Sequence[Bar]) -> list[str]:
    """The table of the targets, as lines of Markdown."""
    return _lines(["asked", "verdict", "figures"], [[bar.asked, bar.verdict, bar.figures] for bar in bars])


def page(
    results: Sequence[Measured], bars: Sequence[Bar], facts: dict[str, str | int], day: str, plots: Sequence[str]
) -> str:
    """A dated page of all tables, with the targets last."""
    lines = [f"# Measured on {day}", "", "`python -m benchmarks` writes this page.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", HOW]
    for name in plots:
        lines += [f"![{name}]({name})", ""]
    for kind in dict.fromkeys(each.kind for each in results):
        lines += [f"## {kind}", "", *table([each for each in results if each.kind == kind]), ""]
    lines += ["## What was asked", "", *bar_table(bars), ""]
    if any(bar.reached is False for bar in bars):
        lines += ["## Out of reach, and what was tried", "", OUT_OF_REACH.read_text(encoding="utf-8")]
    return "\n".join(lines)


def as_json(results: Sequence[Measured], bars: Sequence[Bar], facts: dict[str, str | int], day: str) -> str:
    """All results, with intervals as [median, low, high]."""
    found: dict[str, Any] = {"date": day, "machine": facts}
    found["results"] = [{**asdict(each), "point": dict(each.point), "best_peer": each.best_peer} for each in results]
    found["bars"] = [bar._asdict() for bar in bars]
    return json.dumps(found, indent=1)


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table with aligned columns, text left and numbers right; columns without an entry are left out."""
    used = [column for column in range(len(head)) if any(row[column] for row in body)]
    widths = {column: max(len(row[column]) for row in [head, *body]) for column in used}
    rows = [head, ["-" * widths.get(column, 0) for column in range(len(head))], *body]
    words = {column for column in used if any(row[column][:1].isalpha() for row in body)}
    justified = [
        [row[column].ljust(widths[column]) if column in words else row[column].rjust(widths[column]) for column in used]
        for row in rows
    ]
    return ["| " + " | ".join(cells) + " |" for cells in justified]


def _milliseconds(seconds: float) -> str:
    """A time with at least three digits."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _with_range(value: Interval | None, form: str) -> str:
    return "" if value is None else "{} [{}, {}]".format(*(form.format(each) for each in value))


def _plain(value: str | int) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _commit() -> str:
    """The commit of the measured tree, or a note that there is none."""
    root = Path(__file__).parent.parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with changes" if changes.stdout.strip() else "")
