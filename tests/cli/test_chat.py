"""Chats at the terminal: answers equal those over the whole text, and only new tokens are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from transformer.checkpoints import load_model, load_tokenizer
from transformer.cli.conversation import Conversation
from transformer.errors import ArgumentError

SAMPLING = ("--max-new-tokens", 9, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.99, "--seed", 5)


def answers(folder: Path, turns: list[str]) -> list[str]:
    """What the model says when it reads the whole text for each token, by the same random numbers."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    generator, text, said = torch.Generator().manual_seed(5), "", []
    tokens: list[int] = []
    for turn in turns:
        text = f"\n{turn}" if tokens else turn
        tokens += tokenizer.encode(text)
        options = {"max_new_tokens": 9, "temperature": 0.9, "top_k": 50, "top_p": 0.99, "generator": generator}
        new = [int(token) for token in model.stream(torch.tensor([tokens]), use_cache=False, **options)]
        said.append(tokenizer.decode(new))
        tokens += new
    return said


def read(err: str) -> list[int]:
    """Tokens that each turn read."""
    return [int(number) for number in re.findall(r"(\d+) tokens? read, 9 written, [\d.,]+ tokens/s, cache [\d,]+", err)]


@pytest.mark.parametrize("name", ["of_bytes", "with_window"])
def test_turns_read_what_is_new_and_answer_to_everything(command, request, name):
    folder, turns = request.getfixturevalue(name), ["Hello", "and then", "ü?"]
    run = command("chat", folder, *SAMPLING, typed="".join(f"{turn}\n\n" for turn in turns))
    assert run.status == 0
    assert run.out == "".join(f"{said}\n" for said in answers(folder, turns))
    assert read(run.err) == [5, 9, 4]


@pytest.mark.parametrize(("name", "again"), [("of_bytes", 9), ("with_window", 9 + 5 + 9)])
def test_a_turn_taken_back_is_asked_again(command, request, name, again):
    """A window has evicted keys of the end of the first turn, which are computed again; the answer is the same."""
    folder, options = request.getfixturevalue(name), ("--max-new-tokens", 9)
    first = command("chat", folder, *options, typed="Hello\n").out
    both = command("chat", folder, *options, typed="Hello\nand then\n").out
    typed = f"Hello\nand then\n{'more and more ' * 4}\n/undo\n/undo\nand then\n"
    run = command("chat", folder, *options, typed=typed)
    assert run.out.startswith(both)
    assert run.out.removeprefix(both).endswith(both.removeprefix(first))
    assert read(run.err) == [5, 9, 57, again]
    assert "[last turn taken back; 1 turn, 14 tokens remain]" in run.err


def test_a_copy_is_gone_back_to_as_often_as_one_likes(command, of_bytes):
    typed = "Hello\n/fork\nand then\n/back\nsomething else\n/back\nand then\n"
    run = command("chat", of_bytes, "--max-new-tokens", 9, typed=typed)
    assert "[copy kept: 1 turn, 14 tokens; /back goes back to it]" in run.err
    assert run.err.count("[went back to the copy: 1 turn, 14 tokens]") == 2
    _, one, other, again = run.out.removesuffix("\n").split("\n")
    assert one == again != other
    assert read(run.err) == [5, 9, 15, 9]


def test_a_saved_conversation_is_gone_on_with(command, with_window, tmp_path):
    file, options = tmp_path / "my chat", ("--max-new-tokens", 9)
    before = command("chat", with_window, *options, typed=f"Hello\nand then\n/save {file}\nnow\n")
    after = command("chat", with_window, *options, typed=f"/load {file}\nnow\n/undo\n/undo\n")
    assert before.out.split("\n")[2] == after.out.split("\n")[0]
    assert read(after.err) == [4]
    assert "[loaded: 2 turns, 32 tokens]" in after.err
    assert "[last turn taken back; 1 turn, 14 tokens remain]" in after.err


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("/undo", "/undo: there is no turn yet"),
        ("/retry", "/retry: there is no turn yet"),
        ("/back", "/fork keeps one"),
        ("/load no such file", "no such file"),
        ("/load", "/load needs a file name: /load FILE"),
        ("/save", "/save needs a file name: /save FILE"),
        ("/save no/such/folder/x", "No such file or directory"),
        ("/save ~no-such-user/x", "~no-such-user/x: expected ~ or ~USER with a home folder"),
        ("/load ~no-such-user/x", "~no-such-user/x: expected ~ or ~USER with a home folder"),
        ("/load ~x\0y", "expected ~ or ~USER with a home folder"),
        ("/save x\0y", r"error: 'x\x00y': expected the name of a file"),
        ("/load x\0y", r"error: 'x\x00y': expected the name of a file"),
        ("/nonsense", "there is no command /nonsense; /help lists them"),
        ("/hsitory", "there is no command /hsitory, the nearest is /history; /help lists them"),
        ("/Undo", "there is no command /Undo, the nearest is /undo; /help lists them"),
        ("/undo now", "/undo takes no argument, got now"),
    ],
)
def test_a_mistake_does_not_end_a_chat(command, of_bytes, typed, complaint):
    run = command("chat", of_bytes, "--max-new-tokens", 9, typed=f"{typed}\nHello\n/quit\nHello\n")
    assert run.status == 0
    assert re.search(rf"^\[(?=error: ).*{re.escape(complaint)}", run.err, re.MULTILINE)
    assert read(run.err) == [5]


def test_a_conversation_of_another_model_is_refused_and_nothing_lost(command, of_bytes, with_window, tmp_path):
    command("chat", with_window, "--max-new-tokens", 9, typed=f"Hello\n/save {tmp_path / 'file'}\n")
    run = command("chat", of_bytes, "--max-new-tokens", 9, typed=f"Hello\n/load {tmp_path / 'file'}\nand then\n")
    assert "[error: model: expected a model with the layers that made this cache" in run.err
    assert read(run.err) == [5, 9]


# --- with a chat template, and where an answer does not come to its end ---------------------------------------------


@pytest.fixture
def conversation(with_template: Path) -> Conversation:
    return Conversation(load_model(with_template), load_tokenizer(with_template))


def test_a_chat_template_says_what_is_read(conversation, with_template):
    tokenizer, model = load_tokenizer(with_template), load_model(with_template)
    for turn in ("The quick brown", "fox", "jumps"):
        shown: list[str] = []
        asked = [*conversation.transcript.messages, {"role": "user", "content": turn}]
        held = conversation.transcript.tokens
        cost = conversation.ask(turn, shown.append, max_new_tokens=6)
        planned = tokenizer.encode_chat(asked)
        new = [int(token) for token in model.stream(torch.tensor([planned]), max_new_tokens=6, use_cache=False)]
        assert list(conversation.transcript.tokens) == planned + new
        assert conversation.transcript.messages[-1] == {"role": "assistant", "content": "".join(shown)}
        assert "".join(shown) == tokenizer.decode(new)
        alike = next((i for i, pair in enumerate(zip(held, planned, strict=False)) if len(set(pair)) > 1), len(held))
        assert cost.read == len(planned) - alike, "what is as it was is not read again"
        assert not held or alike > 10


def test_an_answer_that_is_interrupted_ends_there(conversation):
    shown: list[str] = []

    def interrupt(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    cost = conversation.ask("The quick brown", interrupt, max_new_tokens=6)
    assert cost.written == 3
    assert len(conversation.transcript.tokens) == conversation.cache.length == cost.read + 3
    conversation.undo()
    assert conversation.cache.length == 0


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(conversation):
    def fail(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        raise ArgumentError("no")

    conversation.ask("The quick brown", str, max_new_tokens=6)
    said, copy = conversation.transcript, conversation.copy()
    with pytest.raises(ArgumentError, match="no"):
        conversation.ask("fox", str, max_new_tokens=6, processors=[fail])
    assert conversation.transcript == said
    assert conversation.cache.length <= len(said.tokens)
    conversation.ask("fox", str, max_new_tokens=6)
    after = conversation.transcript
    conversation.restore(copy)
    conversation.ask("fox", str, max_new_tokens=6)
    assert conversation.transcript == after
