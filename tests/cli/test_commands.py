"""Commands generate and inspect, and the errors of all commands."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoints.compositions import LAYERED
from tests.checkpoints.tokenizers_of_text import byte_level, save
from tests.cli.conftest import WINDOW, saved
from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, cache_bytes
from transformer.checkpoints import load_model, load_tokenizer, save_model
from transformer.cli.inspect import described
from transformer.models import EncoderTransformer, LayerParts, composed

PROMPT = "The quick"


def written(folder: Path, **options: object) -> str:
    """What the model itself generates."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompt = tokenizer.encode(PROMPT)
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, **options)
    return tokenizer.decode(tokens[0, len(prompt) :].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["of_bytes", "with_window", "with_template"])
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((), {}),
        (("--no-cache",), {"use_cache": False}),
        (("--num-beams", 3), {"num_beams": 3}),
        (("--temperature", 0.8, "--top-k", 20), {"temperature": 0.8, "top_k": 20}),
        (("--temperature", 0.8, "--min-p", 0.1, "--device", "cpu"), {"temperature": 0.8, "min_p": 0.1}),
        (("--repetition-penalty", 1.5), {"repetition_penalty": 1.5}),
        (("--temperature", 2, "--top-p", 0.5, "--seed", 7), {"temperature": 2, "top_p": 0.5}),
    ],
)
def test_generate_prints_what_the_model_writes(command, request, name, given, options):
    folder = request.getfixturevalue(name)
    generator = torch.Generator().manual_seed(7 if "--seed" in given else 0)
    expected = written(folder, generator=generator, stop_tokens=load_tokenizer(folder).stop_tokens, **options)
    run = command("generate", folder, PROMPT, "--max-new-tokens", 12, *given)
    assert (run.status, run.out) == (0, f"{expected}\n")


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_writing_ends_with_the_stop_token_of_the_tokenizer(command, with_template, tmp_path, name):
    folder, tokenizer = shutil.copytree(with_template, tmp_path / "model"), load_tokenizer(with_template)
    prompt = tokenizer.encode(PROMPT)
    tokens = load_model(with_template).generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :].tolist()
    stop = next(token for token in tokens[2:] if token > 1)
    save(byte_level(), folder, eos_token=byte_level().id_to_token(stop))
    given = {"chat": (), "generate": (PROMPT,)}[name]
    run = command(name, folder, *given, "--max-new-tokens", 12, typed=f"{PROMPT}\n")
    # What a folder names as its end is a special token, and as such not written.
    assert run.out == tokenizer.decode(tokens[: tokens.index(stop)]) + "\n"


@pytest.mark.parametrize("given", [(), ("--num-beams", 3), ("--no-cache",)], ids=str)
@pytest.mark.parametrize("name", ["of_bytes", "with_template"])
def test_writing_ends_before_a_stop(command, request, name, given):
    """The text that ends it is not written, nor its beginning; of several the first."""
    folder = request.getfixturevalue(name)
    text = command("generate", folder, PROMPT, "--max-new-tokens", 12, *given).out[:-1]
    stop = text[4:6]
    run = command("generate", folder, PROMPT, "--max-new-tokens", 12, *given, "--stop", "no such", "--stop", stop)
    # With another end a beam search may find another text.
    assert stop not in run.out if "--num-beams" in given else run.out == text.partition(stop)[0] + "\n"
    if not given:
        chat = command("chat", folder, "--max-new-tokens", 12, "--stop", stop, typed=f"{PROMPT}\n")
        assert chat.status == 0
        assert stop not in chat.out


def test_generate_in_another_dtype(command, of_bytes):
    model = load_model(of_bytes, torch.bfloat16)
    tokens = model.generate(torch.tensor([list(PROMPT.encode())]), max_new_tokens=12)
    run = command("generate", of_bytes, PROMPT, "--max-new-tokens", 12, "--dtype", "bfloat16")
    assert run.out == bytes(tokens[0, len(PROMPT) :].tolist()).decode("utf-8", "replace") + "\n"


def test_inspect_reads_no_weights(command, with_window, tmp_path):
    shutil.copytree(with_window, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    run = command("inspect", tmp_path, "--lengths", 10, 5000, "--batch", 3)
    assert run.status == 0

    model = load_model(with_window)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"DecoderOnlyTransformer: {count:,} parameters, {8 * count:,} bytes in float64\n" in run.out
    rows = [line.split() for line in run.out.splitlines()]
    assert ["decoder.blocks.*.attention", "2", "4", "2", "4", str(WINDOW)] in rows
    model.enable_cache()
    for length in (10, 5000):
        held = 3 * 2 * 2 * 2 * 4 * min(length, WINDOW) * 8
        assert [f"{length:,}", f"{held:,}", f"{cache_bytes(model, 3, length):,}"] in rows
    assert "a window has 2 x window + sinks + 64 slots" in run.out
    assert "up to twice the tokens, or 64 tokens more if that is larger" in run.out


def test_inspect_tells_layers_apart(command, tmp_path):
    options = {"layer_pattern": "full sliding", "window_size": 6, "attention_bias": True, "out_bias": False}
    folder = saved(tmp_path / "model", 50, tied_embeddings=False, **options)
    run = command("inspect", folder, "--dtype", "float16", "--lengths", 7)
    rows = [line.split() for line in run.out.splitlines()]
    assert ["decoder.blocks.*.attention", "1", "4", "2", "4", "all"] in rows
    assert ["decoder.blocks.*.attention", "1", "4", "2", "4", "6"] in rows
    assert "bytes in float16" in run.out


@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_inspect_reads_the_formats_of_this_library(command, tmp_path, position):
    folder, composition = tmp_path / "model", LAYERED["different"]
    options = composition.layers[2].options
    layers = (*composition.layers[:2], LayerParts(replace(options, position=position, qk_norm=False), None))
    model = composed(replace(composition, layers=layers)).eval()
    save_model(model, folder)
    run = command("inspect", folder, "--lengths", 10)
    rows = [line.split() for line in run.out.splitlines()]
    assert ["decoder.blocks.*.attention", "1", "4", "4", "4", "5"] in rows
    assert ["decoder.blocks.*.attention", "1", "2", "1", "8", "all"] in rows
    assert ["decoder.blocks.*.attention", "1", "4", "4", "4", "all"] in rows
    held = 2 * 4 * (4 * 4 * 5 + 8 * 10 + 4 * 4 * 10)
    assert ["10", f"{held:,}", f"{cache_bytes(model.enable_cache(), 1, 10):,}"] in rows
    assert "vocabulary: 31 tokens; context: any number of tokens" in run.out


@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({}, "any number of tokens"),
        ({"context_length": 4096}, "trained at up to 4,096 tokens, more can be read"),
        ({"position": "learned", "max_length": 2048, "num_groups": 4}, "at most 2,048 tokens"),
    ],
)
def test_inspect_tells_vocabulary_and_context(options, context):
    with torch.device("meta"):
        model = DecoderOnlyTransformer(1234, 16, 4, 32, 2, attention="gqa", **{"num_groups": 2} | options).eval()
    assert f"vocabulary: 1,234 tokens; context: {context}" in "\n".join(described(model, [100], 1))


def test_models_that_read_sources_and_models_that_write_nothing_are_described():
    with torch.device("meta"):
        model = EncoderDecoderTransformer(20, 30, 16, 4, 32, 3, num_decoder_layers=2, window_size=5).eval()
    rows = [line.split() for line in described(model, [100], 2)]
    assert ["encoder.blocks.*.attention", "3", "4", "4", "4", "all"] in rows
    assert ["decoder.blocks.*.attention", "2", "4", "4", "4", "5"] in rows
    assert ["decoder.blocks.*.cross_attention", "2", "4", "4", "4", "all"] in rows
    row = next(row for row in rows if row[:1] == ["100"])
    assert row[1:] == [
        f"{2 * 2 * 2 * 16 * (5 + 100) * 4:,}",
        f"{cache_bytes(model.config, 2, 100, source_length=100):,}",
    ]
    text = "vocabulary: 20 tokens of the source, 30 tokens of the target; context: any number of tokens"
    assert " ".join(rows[1]) == text
    with torch.device("meta"):
        encoder = EncoderTransformer(20, 16, 4, 32, 3, position="learned", max_length=64)
    lines = list(described(encoder, [100], 1))
    assert lines[-1].split()[0] == "encoder.blocks.*.attention"
    assert lines[1] == "vocabulary: 20 tokens; context: at most 64 tokens, the size of its position table"


@pytest.mark.parametrize("name", ["chat", "generate", "inspect"])
def test_what_is_no_model_is_said_in_one_line(command, tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "unheard of"}')
    for folder in (tmp_path, tmp_path / "nowhere"):
        run = command(name, folder, *(["x"] if name == "generate" else []))
        assert (run.status, run.out) == (2, "")
        assert run.err.startswith("error: ")
        assert run.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (("x", "--max-new-tokens", 0), "--max-new-tokens: expected"),
        (("x", "--temperature", -1), "--temperature: expected a finite number above 0, or 0"),
        (("x", "--repetition-penalty", -1), "--repetition-penalty: expected a finite number above 0, or 0"),
        (("x", "--min-p", -1), "--min-p: expected a finite number above 0 and at most 1, or 0"),
        (("x", "--top-k", -1), "--top-k: expected a whole number (int) of at least 0"),
        (("x", "--top-p", 2, "--temperature", 1), "--top-p: expected"),
        (("x", "--num-beams", 0), "--num-beams: expected"),
        (("",), "PROMPT: expected at least one token"),
        (("x", "--device", "nowhere"), "--device: expected a device of this machine, such as cpu, got nowhere"),
        (("x", "--device", "meta"), "--device: expected a device of this machine, such as cpu, got meta"),
        (("x", "--stop", ""), "--stop: expected a text of at least one character"),
        (("x", "--seed", 2**70), "--seed: expected a whole number of at most 64 bits"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(command, of_bytes, given, complaint):
    run = command("generate", of_bytes, *given)
    assert (run.status, run.out) == (2, "")
    assert run.err.startswith(f"error: {complaint}")
    assert run.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (("--lengths", 7, -1), "--lengths: expected whole numbers of at least 0, got -1"),
        (("--batch", 0), "--batch: expected a whole number of at least 1, got 0"),
    ],
)
def test_inspect_names_the_option_that_has_no_meaning(command, of_bytes, given, complaint):
    run = command("inspect", of_bytes, *given)
    assert (run.status, run.out, run.err) == (2, "", f"error: {complaint}\n")


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_characters_that_the_output_cannot_write_are_replaced(command, of_bytes, monkeypatch, name):
    """As under `PYTHONIOENCODING=latin-1`."""
    given = {"chat": (), "generate": ("Hello",)}[name]
    whole = command(name, of_bytes, *given, "--max-new-tokens", 30, typed="Hello\n").out
    assert any(ord(character) > 255 for character in whole)
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert command(name, of_bytes, *given, "--max-new-tokens", 30, typed="Hello\n").status == 0
    narrow.flush()
    assert narrow.buffer.getvalue() == whole.encode("latin-1", "replace")


@pytest.mark.parametrize(("name", "given"), [("generate", (PROMPT,)), ("chat", ()), ("inspect", ())])
def test_a_command_whose_output_is_not_read_ends_without_words(command, of_bytes, tmp_path, monkeypatch, name, given):
    """As `... | head` does."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def fileno(self) -> int:
            return file.fileno()

    with open(tmp_path / "output", "w") as file:
        monkeypatch.setattr(sys, "stdout", Closed())
        run = command(name, of_bytes, *given, typed="Hello\nHello\n")
    assert run.status == 1
    assert "error" not in run.err


@pytest.mark.slow
def test_the_module_runs_as_a_program(of_bytes):
    command = [sys.executable, "-W", "error", "-m", "transformer", "chat"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "encoding": "utf-8", "env": environment, "timeout": 300, "check": False}
    # A byte that is no UTF-8 goes through as it is.
    options["errors"] = "surrogateescape"
    conversation = subprocess.run([*command, of_bytes, "--max-new-tokens", "4"], input="Hell\udcff\n", **options)
    assert (conversation.returncode, conversation.stdout.count("\n")) == (0, 1), conversation.stderr
    assert "5 tokens read, 4 written" in conversation.stderr
    wrong = subprocess.run([*command, "no such folder"], input="Hello\n", **options)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: no such folder: expected the folder of a checkpoint")
