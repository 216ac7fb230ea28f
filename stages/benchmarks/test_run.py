"""The benchmark on shapes so small that it takes seconds: every kind of case is built, measured and reported."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import KINDS, run
from benchmarks.bars import all_bars
from benchmarks.grid import QUICK, Model, SourceModel

TINY = replace(
    QUICK,
    seconds=0.1,
    embed_dim=64,
    num_heads=4,
    groups=(4, 1),
    prefill_groups=(4, 2),
    cached=(16, 32),
    chunks=(4,),
    chunks_on=(32,),
    prefill=(32,),
    windowed=((8, 32),),
    streaming=((8, 2, 100),),
    training=((2, 16),),
    ragged=32,
    contexts=(8,),
    new_tokens=(3,),
    generated=3,
    held=8,
    llama=Model("tiny Llama", 2, 36, 3, 1, 64, 100),
    small=Model("tiny", 2, 32, 4, 4, 64, 100),
    umt5=SourceModel("tiny UMT5", 2, 32, 3, 8, 64, 100),
    stack_layers=3,
    compiler="aot_eager",
)


@pytest.fixture
def _threads() -> Iterator[None]:
    """As many threads afterwards as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_threads")
# x-transformers still marks parts of its own code so.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_every_kind_of_case_is_measured_and_reported(tmp_path: Path) -> None:
    names = [name for name in KINDS if name != "importing"]  # which takes seconds in processes of its own
    results = run(TINY, names, tmp_path, threads=1)

    expected = [case for name in names for case in KINDS[name](TINY)]
    assert [(each.kind, each.point) for each in results] == [(case.kind, case.point) for case in expected]
    for each in results:
        assert each.rounds >= 1
        for interval in (*each.seconds.values(), *each.ratios.values()):
            assert 0 < interval.low <= interval.median <= interval.high
        assert set(each.peers) <= set(each.ratios) == set(each.seconds) - {"ours"}

    (page,), (found,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    text = page.read_text(encoding="utf-8")
    for kind in {each.kind for each in results}:
        assert f"## {kind}\n" in text
    for picture in tmp_path.glob("*.png"):
        assert f"]({picture.name})" in text
    assert len(list(tmp_path.glob("*.png"))) == 2
    asked, _, tried = text.partition("## Out of reach, and what was tried\n")
    assert "import of transformer" in asked.rstrip().splitlines()[-1]
    assert bool(tried) == any(bar.reached is False for bar in all_bars(results))
    loaded = json.loads(found.read_text(encoding="utf-8"))
    assert [each["point"] for each in loaded["results"]] == [dict(each.point) for each in results]
    assert {"torch", "transformers", "x-transformers", "commit"} <= loaded["machine"].keys()
    assert all(bar["reached"] in (True, False, None) for bar in loaded["bars"])


def test_what_does_not_fit_in_memory_is_left_out() -> None:
    # Two float32 rows of 16 tokens at G = H = 4; those of bfloat16 need five eighths of it.
    grid = replace(TINY, cached=(16, 32, 48), batches=(1, 2), memory=2 * 16 * 16 * 4 * (4 * 10 + 16 + 4 * 2))
    points = [case.point for case in KINDS["decode_step"](grid) if case.point["G"] == 4]
    sizes = {(point["dtype"], int(point["batch"]) * int(point["cached"])) for point in points}
    assert sizes == {("float32", 16), ("float32", 32), ("bfloat16", 16), ("bfloat16", 32), ("bfloat16", 48)}
