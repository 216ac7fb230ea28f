"""The benchmark on shapes so small that it takes seconds: every kind of case is built, measured and reported."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import ctranslate2_models, our_models, padded, peer_models, usage
from benchmarks.__main__ import KINDS, run
from benchmarks.bars import all_bars
from benchmarks.before import ROOT, BeforeProcess
from benchmarks.grid import QUICK
from benchmarks.saved import saved, with_weights
from benchmarks.shapes import EncoderModel, Model, Rows, SourceModel

TINY = replace(
    QUICK,
    second=0.002,
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
    assistant=Model("tiny assistant", 1, 16, 2, 1, 32, 100),
    pair_steps=2,
    small=Model("tiny", 2, 32, 4, 4, 64, 100),
    umt5=SourceModel("tiny UMT5", 2, 32, 3, 8, 64, 100),
    qwen3=Model("tiny Qwen3", 2, 32, 4, 2, 64, 100, head_dim=12, qk_norm=True),
    encoder=EncoderModel("tiny encoder", 2, 32, 4, 64, 100),
    decoder=Model("tiny decoder", 2, 32, 4, 2, 64, 100),
    host_bound=(Model("tiny, host", 2, 32, 4, 2, 64, 100),),
    padded=(Rows(4, 3, 9),),
    forward=((2, 8),),
    long_prompt=(40, 8),
    batch=3,
    trained=(2, 8),
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
    assert "peak memory" in asked.rstrip().splitlines()[-1]  # the last target of what was measured
    assert bool(tried) == any(bar.reached is False for bar in all_bars(results))
    loaded = json.loads(found.read_text(encoding="utf-8"))
    assert [each["point"] for each in loaded["results"]] == [dict(each.point) for each in results]
    assert {"torch", "transformers", "x-transformers", "ctranslate2", "torchao", "commit"} <= loaded["machine"].keys()
    assert all(bar["reached"] in (True, False, None) for bar in loaded["bars"])


@pytest.mark.slow
def test_all_libraries_generate_the_same_tokens() -> None:
    """Equal weights and equal work: the candidates of a case, by what their runs return."""
    new, shape, float32 = 12, TINY.decoder, ctranslate2_models.FLOAT32
    setup = usage.generation(TINY, "float32", shape, usage.ways(TINY)[f"{TINY.batch} rows"], new)
    ours, theirs, others = (each.run() for each in (setup.ours, *setup.peers.values()))
    assert torch.equal(ours, theirs)
    assert ours[:, -new:].tolist() == others
    assert len(ours[:, -new:].unique()) > 1  # a tied head repeats the last token of a row

    source = TINY.place().ids(TINY.umt5.vocab_size, 9, 2)
    model = our_models.umt5(TINY.umt5, TINY.place())
    theirs = with_weights(peer_models.umt5(TINY.umt5, TINY.place()), saved(TINY.umt5, lambda: model))
    ours = model.generate(source, max_new_tokens=new)
    assert torch.equal(ours, peer_models.writing(theirs, source, new).run()[:, 1:])
    folder = saved(TINY.umt5, lambda: model)
    others = ctranslate2_models.translating(folder, TINY.umt5.vocab_size, float32, source.tolist(), new).run()
    assert [[int(token[1:]) for token in row] for row in others] == ours.tolist()


@pytest.mark.slow
def test_an_encoder_of_all_libraries_gives_the_same_states() -> None:
    rows = TINY.padded[0]
    setup = padded.states(TINY, "float32", rows, states=True)
    ours, theirs, others = (each.run() for each in (setup.ours, *setup.peers.values()))
    mask, others = TINY.place().mask(rows, left=False), torch.tensor(others)
    torch.testing.assert_close(ours[mask], theirs.last_hidden_state[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[mask], others[mask], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_library_in_a_process_of_its_own_takes_its_turns() -> None:
    process = BeforeProcess(ROOT)
    arguments, options = our_models.decoder_options(TINY.decoder)
    candidate = process.writing(arguments, options, torch.bfloat16, torch.tensor([[5, 6, 7]]), 4)
    assert [candidate.run(), candidate.run()] == [4, 4]
    process.close()

    process = BeforeProcess(ROOT)
    with pytest.raises(RuntimeError, match="ended with exit status 1"):
        process.writing(["no model"], {}, torch.float32, torch.tensor([[5]]), 4)


def test_what_does_not_fit_in_memory_is_left_out() -> None:
    # Two float32 rows of 16 tokens at G = H = 4; those of bfloat16, with our float32 beside them, need 11/14 of it.
    grid = replace(TINY, cached=(16, 32, 40), batches=(1, 2), memory=2 * 16 * 16 * 4 * (4 * 10 + 16))
    points = [case.point for case in KINDS["decode_step"](grid) if case.point["G"] == 4]
    sizes = {(point["dtype"], int(point["batch"]) * int(point["cached"])) for point in points}
    assert sizes == {("float32", 16), ("float32", 32), ("bfloat16", 16), ("bfloat16", 32), ("bfloat16", 40)}
