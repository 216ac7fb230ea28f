"""Comparison of generation with and without caches: the table shows what was measured."""

from __future__ import annotations

import sys

import pytest
import torch

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, cache_bytes
from transformer.errors import ArgumentError, CacheStateError
from transformer.models import Comparison, ComparisonTable, compare_generation, plot_comparison

SHAPE = 16, 4, 32, 2


def decoder(**options: object) -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(11, *SHAPE, **options).double().eval()


MODELS = {
    "decoder-only": decoder,
    "encoder-decoder": lambda: EncoderDecoderTransformer(11, 11, *SHAPE).double().eval(),
    "vectors": lambda: EncoderDecoderTransformer(None, 11, *SHAPE).eval(),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_row_for_each_length(kind: str) -> None:
    model = MODELS[kind]()
    table = compare_generation(model, (1, 5), batch_size=3, runs=2, prompt_length=4, progress=False)
    assert [(row.new_tokens, row.batch_size, row.equal) for row in table] == [(1, 3, True), (5, 3, True)]
    for row in table:
        assert row.seconds_cached > 0
        assert row.seconds_uncached > 0
        assert row.speed_up == row.seconds_uncached / row.seconds_cached
        assert row.tokens_per_second[0] == 3 * row.new_tokens / row.seconds_cached
        assert row.cache_bytes <= cache_bytes(model.enable_cache(), 3, 4 + row.new_tokens, 4)
        model.disable_cache()
    assert model.kv_cache is None, "nothing is left in the model"


def test_stop_tokens_do_not_cut_a_measurement_short() -> None:
    model = decoder(stop_tokens=tuple(range(11)))
    calls = []
    original = model.generate
    model.generate = lambda *arguments, **options: calls.append(original(*arguments, **options)) or calls[-1]
    compare_generation(model, (6,), runs=1, prompt_length=2, progress=False)
    assert calls[-1].shape == (1, 8)


def test_a_prompt_of_ones_own() -> None:
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    (row,) = compare_generation(decoder(), (2,), runs=1, prompt=prompt, progress=False)
    assert row.batch_size == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("batch_size", {"batch_size": 0}),
        ("runs", {"runs": 0}),
        ("prompt_length", {"prompt_length": -1}),
        ("lengths", {"lengths": (3, 0)}),
        ("lengths", {"lengths": (2.0,)}),
    ],
)
def test_refused(name: str, options: dict) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: expected .*, got "):
        compare_generation(decoder(), progress=False, **options)


def test_a_conversation_is_not_lost() -> None:
    model = decoder().enable_cache()
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    with pytest.raises(CacheStateError, match=r"^model: expected one whose caches are off"):
        compare_generation(model, (2,), progress=False)
    assert model.kv_cache.length == 2


def test_without_tqdm_or_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'progress=False .*needs tqdm: pip install -e "\.\[examples\]"'):
        compare_generation(decoder(), (1,), runs=1)
    with pytest.raises(ModuleNotFoundError, match=r'needs matplotlib: pip install -e "\.\[plots\]"'):
        plot_comparison((), tmp_path / "plot.png")


def test_the_table_and_the_plot(tmp_path) -> None:
    table = ComparisonTable(
        [Comparison(10, 2, 0.5, 1.0, 4096, True), Comparison(1000, 2, 10.0, 125.0, 1_048_576, False)]
    )
    head, first, second = str(table).splitlines()
    assert head.split()[0] == "tokens"
    assert first.split() == ["10", "0.500", "1.000", "40.0", "20.0", "2.00", "4,096", "yes"]
    assert second.split() == ["1,000", "10.000", "125.000", "200.0", "16.0", "12.50", "1,048,576", "NO"]
    plot_comparison(table, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
