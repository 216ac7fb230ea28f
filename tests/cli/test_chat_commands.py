"""Commands and options of a chat: retry, clear, notices, and the sources of sampling options."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoints.tokenizers_of_text import TEMPLATE, byte_level
from tests.checkpoints.tokenizers_of_text import save as save_tokenizer
from tests.cli.conftest import saved
from tests.cli.test_chat import read
from transformer.checkpoints import load_model, load_tokenizer
from transformer.cli.chat_commands import COMMANDS
from transformer.cli.conversation import Conversation
from transformer.errors import ArgumentError

NINE = ("--max-new-tokens", 9)


# --- another answer, a new beginning --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["of_bytes", "with_window", "with_template"])
def test_retry_answers_the_last_message_again_with_other_random_numbers(request, name):
    folder = request.getfixturevalue(name)
    tokenizer, model, chat_model = load_tokenizer(folder), load_model(folder), load_model(folder)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    options = {"max_new_tokens": 9, "temperature": 1.5}
    conversation = Conversation(chat_model, tokenizer)
    conversation.ask("Hello", str, generator=generators[0], **options)
    first = conversation.transcript
    conversation.ask("and then", str, generator=generators[0], **options)
    second = conversation.transcript
    cost = conversation.ask_again(str, generator=generators[0], **options)

    planned = second.tokens[: len(second.tokens) - 9]
    for said in (first, second, conversation.transcript):
        tokens = torch.tensor([said.tokens[:-9]])
        new = [int(token) for token in model.stream(tokens, use_cache=False, generator=generators[1], **options)]
        assert list(said.tokens[-9:]) == new
    assert conversation.transcript.tokens[:-9] == planned
    assert conversation.transcript.tokens != second.tokens
    assert conversation.transcript.messages[:3] == second.messages[:3]
    assert cost.read == 1, "the message has been read already"
    conversation.undo()
    assert conversation.transcript.messages == first.messages


def test_a_retry_that_fails_leaves_the_conversation_as_it_was(with_template):
    def fail(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ArgumentError("no")

    conversation = Conversation(load_model(with_template), load_tokenizer(with_template))
    conversation.ask("The quick brown", str, max_new_tokens=6)
    said = conversation.transcript
    with pytest.raises(ArgumentError, match="no"):
        conversation.ask_again(str, max_new_tokens=6, processors=[fail])
    assert conversation.transcript == said
    conversation.ask_again(str, max_new_tokens=6)
    assert conversation.transcript == said, "the likeliest tokens are the same ones"


def test_ctrl_c_at_the_very_end_of_an_answer_leaves_the_conversation_as_it_was(of_bytes, monkeypatch):
    conversation = Conversation(load_model(of_bytes), load_tokenizer(of_bytes))
    conversation.ask("Hello", str, max_new_tokens=3)
    said = conversation.transcript

    def interrupted(_stream: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformer.checkpoints.text_stream.ByteStream.rest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("and then", str, max_new_tokens=3)
    copy = conversation.copy()
    assert copy.transcript == said
    assert copy.cache.length <= len(said.tokens), "a file of a copy is refused where more was read than said"
    conversation.ask("and then", str, max_new_tokens=3)
    after = conversation.transcript
    conversation.restore(copy)
    conversation.ask("and then", str, max_new_tokens=3)
    assert conversation.transcript == after


def test_retry_at_temperature_0_tells_why_the_answer_is_the_same(command, of_bytes):
    run = command("chat", of_bytes, *NINE, typed="Hello\n/retry\n")
    one, again = run.out.splitlines()
    assert one == again
    assert "the temperature is 0, so the answer is the same" in run.err
    assert "[1 token read, 9 written" in run.err
    assert "the temperature" not in command("chat", of_bytes, *NINE, "--temperature", 1, typed="Hello\n/retry\n").err
    assert "the temperature" not in command("chat", of_bytes, *NINE, typed="/retry\n").err


@pytest.mark.parametrize("given", [(), ("--system", "Be short.")])
def test_clear_begins_anew_and_keeps_the_system_message(command, with_template, given):
    run = command("chat", with_template, *NINE, *given, typed="Hello\nand then\n/clear\nHello\n")
    one, _, again = run.out.removesuffix("\n").split("\n")
    assert one == again
    first, _, last = read(run.err)
    assert first == last
    assert "[cleared]\n" in run.err


def test_history_shows_what_was_said(command, with_template):
    run = command("chat", with_template, *NINE, "--system", "Be\nshort.", typed='"""a\nb"""\n/history\n')
    assert f"system:\nBe\nshort.\nuser:\na\nb\nassistant:\n{run.out}" in run.err
    assert "[nothing was said yet]" in command("chat", with_template, typed="/history\n").err


def test_help_tells_the_argument_of_each_command(command, of_bytes):
    err = command("chat", of_bytes, typed="/help\n").err
    for each in COMMANDS:
        assert re.search(rf"^{each.name} {each.argument or ' '} *{re.escape(each.help)}$", err, re.MULTILINE)
    with pytest.raises(SystemExit):
        command("chat", "--help")


def test_exit_is_another_name_of_quit(command, of_bytes):
    assert command("chat", of_bytes, *NINE, typed="/exit\nHello\n").out == ""


def test_lines_in_quotes_are_one_message(command, of_bytes):
    run = command("chat", of_bytes, *NINE, typed='"""one\n/undo\nthree"""\n"""/undo"""\n"""never closed\n')
    assert read(run.err) == [15, 6]
    assert "[error: the input ended in a message" in run.err
    assert run.status == 0


def test_a_name_of_a_file_may_begin_at_home(command, of_bytes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    command("chat", of_bytes, *NINE, typed="Hello\n/save ~/chat\n")
    assert (tmp_path / "chat").is_file()


# --- the system message ---------------------------------------------------------------------------------------------


def test_a_system_message_is_written_by_the_template(with_template):
    tokenizer = load_tokenizer(with_template)
    conversation = Conversation(load_model(with_template), tokenizer, "Be short.")
    conversation.ask("Hello", str, max_new_tokens=3)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    assert list(conversation.transcript.tokens[:-3]) == tokenizer.encode_chat(messages)
    conversation.undo()
    assert [message["role"] for message in conversation.transcript.messages] == ["system"]


def test_a_system_message_without_a_template_begins_the_text(of_bytes):
    conversation = Conversation(load_model(of_bytes), load_tokenizer(of_bytes), "Be short.")
    for _ in range(2):
        conversation.ask("Hello", str, max_new_tokens=3)
        assert bytes(conversation.transcript.tokens[:-3]) == b"Be short.\nHello"
        conversation.undo()


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (TEMPLATE.replace("'bad'", "'system'"), "no such role: system"),
        ("{{ messages[-1]['content'] }}", "--system: expected a model whose chat template writes it"),
    ],
)
def test_a_template_that_takes_no_system_message_is_told_at_the_start(
    command, with_template, tmp_path, template, complaint
):
    folder = shutil.copytree(with_template, tmp_path / "model")
    save_tokenizer(byte_level(), folder, chat_template=template)
    run = command("chat", folder, "--system", "Be short.", typed="Hello\n")
    assert (run.status, run.out) == (2, "")
    assert complaint in run.err


OWN = "this conversation has a system text of its own, which /history shows"
NONE = "this conversation has no system text"
BACK = "; /clear goes back to that of --system"


@pytest.mark.parametrize(
    ("saved_with", "started_with", "notice", "after_clear"),
    [
        (None, None, None, None),
        (None, "Be short.", NONE + BACK, "Be short."),
        ("Be long.", None, OWN, "Be long."),
        ("Be long.", "Be short.", OWN + BACK, "Be short."),
        ("Be short.", "Be short.", None, "Be short."),
    ],
)
def test_load_tells_of_another_system_text_and_clear_goes_back_to_the_one_of_the_option(
    command, with_template, tmp_path, saved_with, started_with, notice, after_clear
):
    def chat(system: str | None, typed: str) -> str:
        return command("chat", with_template, *NINE, *(["--system", system] if system else []), typed=typed).err

    chat(saved_with, f"Hello\n/save {tmp_path / 'saved'}\n")
    err = chat(started_with, f"/load {tmp_path / 'saved'}\n/clear\n/history\n")
    assert re.findall(r"^\[(this conversation .*)\]$", err, re.MULTILINE) == ([notice] if notice else [])
    shown = f"system:\n{after_clear}\n" if after_clear else "[nothing was said yet]\n"
    assert err.endswith(f"[cleared]\n{shown}")


# --- the banner, and where sampling comes from ----------------------------------------------------------------------


def test_the_banner_tells_model_size_and_template(command, of_bytes, with_template):
    model = load_model(of_bytes)
    count = sum(parameter.numel() for parameter in model.parameters())
    err = command("chat", of_bytes).err
    size = f"{count:,} parameters, {8 * count:,} bytes in float64 on cpu"
    assert f"[{of_bytes}, DecoderOnlyTransformer: {size}]\n[--max-new-tokens 200, --temperature 0.0, --seed 0]" in err
    assert "[no chat template: " in err
    assert "no chat template" not in command("chat", with_template, "--device", "cpu").err


def recommending(folder: Path, path: Path, **keys: object) -> Path:
    shutil.copytree(folder, path)
    file = path / "generation_config.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | keys))
    return path


def test_the_sampling_that_a_checkpoint_recommends_is_used_and_told(command, of_bytes, tmp_path):
    keys = {"do_sample": True, "temperature": 1.4, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.1}
    folder = recommending(of_bytes, tmp_path / "model", **keys)
    flags = ("--temperature", 1.4, "--top-k", 30, "--top-p", 0.9, "--repetition-penalty", 1.1)
    run = command("chat", folder, *NINE, typed="Hello\nand then\n")
    assert run.out == command("chat", of_bytes, *NINE, *flags, typed="Hello\nand then\n").out
    assert run.out != command("chat", of_bytes, *NINE, typed="Hello\nand then\n").out
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        assert f"{flag} {value} (generation_config.json)" in run.err

    other = command("chat", folder, *NINE, "--temperature", 0, "--repetition-penalty", 1, typed="Hello\n")
    assert other.out == command("chat", of_bytes, *NINE, typed="Hello\n").out
    assert "--temperature 0.0, " in other.err
    short = recommending(of_bytes, tmp_path / "short", max_new_tokens=4)
    assert " 4 written" in command("chat", short, typed="Hello\n").err


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_the_source_of_an_option_is_the_file_only_where_it_has_the_key(command, of_bytes, tmp_path, name):
    folder = recommending(of_bytes, tmp_path / "model", do_sample=True, temperature=0.7, top_p=0.9)
    if name == "config.json":
        recommended = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | recommended))
    err = command("chat", folder, "--top-p", 0.9, typed="").err
    line = next(line for line in err.splitlines() if "--seed" in line)
    assert f"--temperature 0.7 ({name}), --top-k 50 (default of transformers), --top-p 0.9, " in line


def test_recommendations_without_a_flag_are_used_and_told(command, of_bytes, tmp_path):
    folder = recommending(of_bytes, tmp_path / "model", no_repeat_ngram_size=1)
    run = command("chat", folder, *NINE, typed="Hello\n")
    assert run.out != command("chat", of_bytes, *NINE, typed="Hello\n").out
    assert "no_repeat_ngram_size 1 (generation_config.json)" in run.err

    last = recommending(of_bytes, tmp_path / "last", forced_eos_token_id=65, min_new_tokens=3)
    run = command("chat", last, *NINE, typed="Hello\n")
    assert run.out == command("chat", of_bytes, "--max-new-tokens", 8, typed="Hello\n").out.rstrip("\n") + "A\n"
    assert "min_new_tokens 3 (generation_config.json)" in run.err


def test_recommended_beams_are_told_and_not_used(command, of_bytes, tmp_path):
    folder = recommending(of_bytes, tmp_path / "model", num_beams=4, length_penalty=2.0)
    run = command("chat", folder, *NINE, typed="Hello\n")
    assert run.out == command("chat", of_bytes, *NINE, typed="Hello\n").out
    assert "not used, as answers are shown while they are written: num_beams 4, length_penalty 2.0" in run.err


def test_recommendations_that_cannot_be_kept_are_told_and_not_used(command, of_bytes, tmp_path):
    folder = recommending(of_bytes, tmp_path / "model", do_sample=True, temperature=0.7, suppress_tokens=[3])
    run = command("chat", folder, *NINE, typed="Hello\n")
    assert run.out == command("chat", of_bytes, *NINE, typed="Hello\n").out
    assert "[the model's own sampling is not used: " in run.err
    assert "suppress_tokens" in run.err


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (("--temperature", -1), "--temperature: expected"),
        (("--max-new-tokens", 0), "--max-new-tokens: expected"),
        (("--device", "nowhere"), "--device: expected a device of this machine"),
        (("--seed", 2**70), "--seed: expected"),
    ],
)
def test_options_without_a_meaning_are_refused_before_the_first_message(command, of_bytes, given, complaint):
    run = command("chat", of_bytes, *given, typed="Hello\n")
    assert (run.status, run.out) == (2, "")
    assert run.err == f"error: {run.err.removeprefix('error: ')}"
    assert run.err.startswith(f"error: {complaint}")


def test_answers_end_where_the_positions_of_the_model_do(command, tmp_path):
    options = {"position": "learned", "max_length": 20, "norm": "layer", "feed_forward": "plain"}
    biases = {"attention_bias": True, "feed_forward_bias": True, "num_groups": None}
    folder = saved(tmp_path / "model", attention="mha", activation="gelu_tanh", **options, **biases)
    run = command("chat", folder, typed="Hello\nand then\n/undo\nnow\n")
    assert "5 tokens read, 15 written" in run.err
    assert "[error: the conversation would be 29 tokens long, and the model can read 20: /undo takes" in run.err
    assert "3 tokens read, 17 written" in run.err
