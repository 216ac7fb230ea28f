"""Runs every example as a user would, and looks for what it has to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    # One thread: tensors this small gain nothing from more, and on a busy machine threads wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *options]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300, check=False)


def printed(name: str, *options: str) -> str:
    done = run(name, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    """The number that stands where `pattern` has its group."""
    found = re.search(pattern, text)
    assert found, f"{pattern!r} not in:\n{text}"
    return float(found[1].replace(",", ""))


@pytest.fixture
def small_text(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("".join(f"{count} times {count} is {count**2}: “naïve”\n" for count in range(700)), "utf-8")
    return path


def options_for(text: Path, *more: str) -> list[str]:
    return ["--text", str(text), "--seconds", "1", "--tokens", "40", *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "module"),
    [("mha", "MultiHeadAttention"), ("mqa", "MultiQueryAttention"), ("gqa", "GroupQueryAttention")],
)
def test_the_language_model_shows_what_its_cache_is_for(small_text, tmp_path, attention, module):
    picture = tmp_path / "time.png"
    options = options_for(small_text, "--attention", attention, "--window", "32", "--plot", str(picture))
    text = printed("language_model.py", *options)

    assert module in text
    assert "both ways gave the same tokens" in text
    assert number(r"with the cache +([\d,]+) tokens/s", text) > 0
    assert number(r"without the cache +([\d,]+) tokens/s", text) > 0
    assert number(r"speed-up +([\d.]+) times", text) > 0

    mha, gqa, mqa = (number(rf"{kind}, \d key/value heads +([\d,]+)", text) for kind in ("MHA", "GQA", "MQA"))
    prompt = number(r"after a prompt of (\d+)", text)
    # Keys and values, of float32, of 4 layers of 4 heads of 32.
    assert mha == 2 * 4 * 4 * 4 * 32 * (prompt + 40)
    assert (gqa, mqa) == (mha / 2, mha / 4)

    assert number(r"cache's bytes stayed constant at ([\d,]+)", text) > 0
    bits = [number(rf"{who} +([\d.]+)", text) for who in ("of order 1", "of order 2", "this model")]
    assert all(0 < value < 8 for value in bits)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_language_model_writes_the_likeliest_bytes_over_any_window(small_text):
    text = printed("language_model.py", *options_for(small_text, "--temperature", "0", "--window", "1"))
    assert "both ways gave the same tokens" in text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--prompt", ""], "--prompt"), (["--tokens", "0"], "--prompt, --tokens"), (["--window", "30000"], "--text")],
)
def test_the_language_model_refuses_what_it_cannot_do(small_text, options, complaint):
    done = run("language_model.py", *options_for(small_text, *options))
    assert done.returncode == 2
    assert f"error: {complaint}" in done.stderr


def test_counting_bytes_tells_the_entropy_of_a_text(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from byte_text import ngram_bits, read_bytes

    noise = torch.randint(16, (200_000,))
    assert [ngram_bits(noise, 190_000, order) for order in (0, 1)] == pytest.approx([4.0, 4.0], abs=0.02)
    circle = torch.arange(10_000) % 100
    assert ngram_bits(circle, 9_000, 0) == pytest.approx(6.64, abs=0.02)
    assert ngram_bits(circle, 9_000, 1) < 0.2
    # The figures that the language model is held against.
    reference, cut = read_bytes(None)
    assert 3.0 < ngram_bits(reference, cut, 1) < 3.5
    assert 2.2 < ngram_bits(reference, cut, 2) < 2.6


def test_the_long_document_takes_flat_memory():
    text = printed("long_document.py")
    rows = [row.split() for row in re.findall(r"^ +\d[\d,.]+ .*$", text, re.MULTILINE)]
    assert len(rows) > 3
    assert len({row[1] for row in rows}) == len({row[2] for row in rows}) == 1, "held tokens, bytes"
    assert "the cache's bytes stayed constant" in text
    assert "the last chunk equals one shot without a cache" in text


def test_the_encoder_decoder_notices_a_changed_source():
    text = printed("encoder_decoder.py")
    new, same, changed = re.findall(r"^(.+), projected in (\d+) of \d+ steps: (.+)$", text, re.MULTILINE)
    assert [count for _, count, _ in (new, same, changed)] == ["1", "0", "1"]
    assert new[2] == same[2] != changed[2]
    assert "the same with the caches and without, and the changed source was noticed" in text


@pytest.mark.slow
def test_a_composed_model_learns_and_writes_with_its_caches():
    text = printed("compose.py", "--steps", "40")
    assert number(r"a loss of ([\d.]+) nats", text) < 3.5, "an even guess costs 5.5"
    # Windows of 8 and 64, and a layer that sees everything: 13 bytes of prompt and 200 written, the last never fed.
    assert "held after 212 bytes: 8 64 8 212" in text


@pytest.mark.slow
def test_a_converted_model_keeps_a_smaller_cache():
    text = printed("convert.py", "--seconds", "2", "--further", "1")
    rows = re.findall(r"^(MHA|GQA|MQA), (\d) +([\d,]+) +([\d.]+) ms +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    assert [row[:2] for row in rows] == [("MHA", "4"), ("GQA", "2"), ("MQA", "1")]
    sizes = [int(row[2].replace(",", "")) for row in rows]
    assert sizes == [sizes[0], sizes[0] // 2, sizes[0] // 4]
    losses = [[float(loss) for loss in row[4:]] for row in rows]
    assert losses[1][0] > losses[0][0], "pooling costs something at first"
    assert all(0 < after < before for before, after in losses), "further training gives some of it back"


@pytest.mark.parametrize("name", ["long_document.py", "encoder_decoder.py", "compose.py", "convert.py"])
def test_a_small_example_stays_small(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 80
