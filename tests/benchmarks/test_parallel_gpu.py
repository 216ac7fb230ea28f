"""Several processes on one card, with tiny sizes on the CPU: what they send is what the formulas say."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.collectives import Collectives, fitted
from benchmarks.parallel_gpu import main, page
from tests.ranks import on_ranks
from transformer.parallel.sequence import MOST_NUMBERS

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "parallel_gpu.sh"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a script of bash")
def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [str(SCRIPT), str(tmp_path), "--device", "cpu", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gloo-1.json", "gloo-2.json", "page.md"]
    for ranks in (1, 2):
        run = json.loads((tmp_path / f"gloo-{ranks}.json").read_text("utf-8"))
        assert run["ranks"] == ranks
        reduce, gather, tensor, forward, step = run["rows"]
        assert reduce["latency, us"] > 0.0
        assert gather["latency, us"] >= 0.0
        for row, name in ((tensor, "token"), (forward, "token"), (step, "step")):
            assert row["difference"] < 2e-6
            expected = row["by the formula"]
            assert (expected > 0) == (ranks > 1)
            # A shared sequence adds the numbers of int64 by which ranks check that they make the same call.
            sent = row[f"bytes sent per {name}"]
            assert expected <= sent <= expected + 8 * MOST_NUMBERS, row
    assert "Tiny sizes, which check the script: no measurement." in (tmp_path / "page.md").read_text("utf-8")
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.stdout.count("there already") == 2


def count(rank: int) -> None:
    x = torch.ones(6)
    with Collectives(2) as counted:
        dist.all_reduce(x)
        dist.all_gather_into_tensor(torch.empty(12), x)
        dist.all_gather([torch.empty(6), torch.empty(6)], x)
        torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_gather_into_tensor(x, 2, dist.group.WORLD.group_name)
        )
        dist.broadcast(x[:2], 0)
        x + x
    assert counted.calls == {"all-reduce": 1, "all-gather": 3, "broadcast": 1}
    assert counted.sent == {"all-reduce": 24.0, "all-gather": 72.0, "broadcast": 8.0}


def test_collectives_are_counted() -> None:
    on_ranks(2, count)


def test_a_line_through_small_and_large_messages() -> None:
    assert fitted([(1000.0, 5e-6 + 1e-6), (1e6, 5e-6 + 1e-3)]) == pytest.approx((5e-6, 1e9))
    # Times that scatter give no negative latency.
    assert fitted([(1000.0, 2e-6), (1e6, 1e-6)])[0] >= 0.0


def test_the_page_has_a_table_for_each_kind_of_row(tmp_path: Path) -> None:
    rows = [{"collective": "all-reduce", "latency, us": 15e-6}, {"tensor ranks": 1, "difference": 1.5e-7, "none": None}]
    run = {"device": "Card 9000", "backend": "nccl", "ranks": 1, "quick": False, "torch": "2.13", "seconds": 3.2}
    (tmp_path / "nccl-1.json").write_text(json.dumps(run | {"rows": rows}), encoding="utf-8")
    main(["page", "--folder", str(tmp_path)])
    text = (tmp_path / "page.md").read_text("utf-8")
    assert text.startswith("# Several processes on Card 9000\n\n## 1 of nccl, torch 2.13, 3 s\n")
    assert "| all-reduce | 15.0 |" in text
    assert "| 1 | 1.50e-07 |  |" in text
    assert page([]).startswith("# Several processes on no device")
