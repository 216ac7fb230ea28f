"""The GPU grid, with tiny sizes on the CPU: its parts, its page, and its bars."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import PARTS, bars, main, page, run, share
from benchmarks.gpu_parts import KERNEL, OURS, SDPA, Place
from benchmarks.gpu_steps import COMPILED, DYNAMIC, STATIC

TINY = Place("cpu", quick=True)


@pytest.mark.parametrize(("part", "count"), [("decode", 8), ("prefill", 2)])
def test_a_part_writes_its_file(part: str, count: int, tmp_path: Path) -> None:
    main([part, "--folder", str(tmp_path), "--device", "cpu", "--quick"])
    assert [path.name for path in tmp_path.iterdir()] == [f"{part}.json"]
    result = json.loads((tmp_path / f"{part}.json").read_text("utf-8"))
    assert len(result["rows"]) == count
    assert result["bandwidth"] > 0
    for row in result["rows"]:
        times = [row[name] for name in (KERNEL, OURS, SDPA) if name in row]
        assert times
        assert all(isinstance(seconds, float) and seconds > 0 for seconds in times), row


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_steps_of_a_model(tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled, eager, written = run("steps", tmp_path, TINY)["rows"]
    assert compiled["step"] == COMPILED
    for row, names in ((compiled, (OURS, STATIC)), (eager, (OURS, DYNAMIC)), (written, (OURS,))):
        assert all(isinstance(row[name], float) for name in names), row


def test_a_part_that_is_late_names_what_it_left_out(tmp_path: Path) -> None:
    rows = run("decode", tmp_path, Place("cpu", quick=True, ends=-math.inf))["rows"]
    assert {row["left out"] for row in rows} == {"no time"}


def test_a_part_that_was_cut_off_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(_: Place) -> Any:
        yield {"rows": 1, "keys": 20000, "G": 8, "bytes": 8000, KERNEL: 1e-6}
        raise KeyboardInterrupt

    monkeypatch.setitem(PARTS, "decode", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("decode", tmp_path, TINY)
    main(["page", "--folder", str(tmp_path)])
    text = (tmp_path / "page.md").read_text("utf-8")
    assert "| 1 | 20,000 | 8 | 8,000 | 1.0 |" in text
    assert "## steps\n\nNot run." in text


def ran(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"device": "Card 9000", "quick": False, "bandwidth": 1e12, "seconds": 3.0, "rows": rows}


def test_bars_and_page(tmp_path: Path) -> None:
    point = {"rows": 1, "G": 8}
    decode = ran(
        [
            {**point, "keys": 2048, "bytes": 1000, KERNEL: 1.0, SDPA: 2.0},
            {**point, "keys": 16384, "bytes": int(0.71e12), KERNEL: 1.0, SDPA: 0.98},
            {**point, "keys": 131072, "bytes": int(0.69e12), KERNEL: 1.0, SDPA: 0.5},
            {**point, "keys": 131072, "bytes": 1, KERNEL: "OutOfMemoryError: no room", SDPA: 0.5},
            {**point, "keys": 131072, "bytes": 1, "left out": "no time"},
        ]
    )
    steps = ran([{"step": COMPILED, "bytes": int(0.8e12), OURS: 1.0, STATIC: 1.5}])
    assert share(decode["rows"][1], 1e12) == 0.71
    assert {name: (count, len(missed)) for name, count, missed in bars({"decode": decode, "steps": steps})} == {
        "everything of ours runs": (5, 1),
        "decode: at least 70% of the copy's bandwidth": (2, 1),
        "no peer is ahead": (4, 1),
        "steps: at least 70% of the copy's bandwidth": (1, 0),
    }
    (tmp_path / "tests.log").write_text("21 passed\n", encoding="utf-8")
    text = page({"decode": decode, "prefill": None, "steps": steps}, tmp_path / "tests.log")
    assert text.startswith("# On Card 9000\n\nMicroseconds")
    for part in ("Device tests: 21 passed", "SDPA by 2.00", "keys 131072, G 8: 69%", "1,500,000.0 (1.50x)", "no room"):
        assert part in text
