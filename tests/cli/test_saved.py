"""Saved chats: one atomic file, checked when it is loaded, and of the model that continues it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as parse
from safetensors.torch import save as build

from tests.internals import digest
from transformer import KVCache
from transformer.checkpoints import load_model, load_tokenizer
from transformer.cli.conversation import Conversation, SavedConversation, Transcript
from transformer.cli.saved import load, save
from transformer.errors import ArgumentError, AttentionError, FileFormatError, ForeignFileError


@pytest.fixture(scope="module")
def conversation(of_bytes: Path) -> Conversation:
    """Two turns."""
    conversation = Conversation(load_model(of_bytes), load_tokenizer(of_bytes))
    for turn in ("Hello", "and then"):
        conversation.ask(turn, str, max_new_tokens=3)
    return conversation


@pytest.fixture
def path(conversation: Conversation, tmp_path: Path) -> Path:
    save(conversation.copy(), tmp_path / "chat")
    return tmp_path / "chat"


def forge(path: Path, change: dict[str, Any] | str) -> None:
    """Says something else, under the digest that it should have."""
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    del metadata["digest"]
    metadata["said"] = change if isinstance(change, str) else json.dumps({**json.loads(metadata["said"]), **change})
    tensors = parse(content)
    path.write_bytes(build(tensors, metadata | {"digest": digest(metadata, tensors)}))


def test_it_is_one_file_and_says_everything(conversation: Conversation, path: Path) -> None:
    assert list(path.parent.iterdir()) == [path]
    copy = load(path)
    assert copy.transcript == conversation.transcript
    assert copy.cache.length == conversation.cache.length > 10
    assert KVCache.load(path).length == copy.cache.length


def test_a_new_chat_may_be_saved_too(of_bytes: Path, tmp_path: Path) -> None:
    conversation = Conversation(load_model(of_bytes), load_tokenizer(of_bytes))
    save(conversation.copy(), tmp_path / "new")
    conversation.restore(load(tmp_path / "new"))
    assert conversation.transcript == Transcript()


MESSAGES = [{"role": role, "content": "x"} for role in ("user", "assistant")]
TOKENS = [1] * 30

FORGED: dict[str, dict[str, Any] | str] = {
    "messages of numbers": {"messages": [1, 2, 3, 4]},
    "messages of words": {"messages": "hello"},
    "fewer messages": {"messages": MESSAGES},
    "more messages": {"messages": MESSAGES * 3},
    "messages in another order": {"messages": MESSAGES[::-1] * 2},
    "messages of another role": {"messages": [{"role": "tool", "content": "x"}, *MESSAGES, MESSAGES[1]]},
    "a system's message in between": {"messages": [*MESSAGES, {"role": "system", "content": "x"}, *MESSAGES]},
    "content of numbers": {"messages": [{"role": "user", "content": 1}, MESSAGES[1]] * 2},
    "messages with more": {"messages": [{**MESSAGES[0], "name": "x"}, MESSAGES[1]] * 2},
    "messages with less": {"messages": [{"role": "user"}, MESSAGES[1]] * 2},
    "no messages": {"messages": []},
    "tokens of words": {"tokens": ["a"] * 30},
    "tokens of a word": {"tokens": "hello"},
    "no tokens": {"tokens": []},
    "fewer tokens than were read": {"tokens": [1] * 10},
    "tokens nested": {"tokens": [[1]] * 30},
    "tokens below 0": {"tokens": [-1] * 30},
    "tokens huge": {"tokens": [2**70] * 30},
    "tokens of fractions": {"tokens": [1.5] * 30},
    "tokens that are true": {"tokens": [True] * 30},
    "tokens of none": {"tokens": None},
    "turns beyond": {"turns": [0, 999]},
    "turns negative": {"turns": [-5, 0]},
    "turns of words": {"turns": ["x", "y"]},
    "turns that go back": {"turns": [8, 0]},
    "turns of fractions": {"turns": [0.0, 8.0]},
    "more turns": {"turns": [0, 8, 9]},
    "fewer turns": {"turns": [0]},
    "turns of a number": {"turns": 2},
    "more": {"more": 1},
    "a list": "[]",
    "no JSON": "{",
    "very deep": "[" * 100_000,
    "a huge number": "9" * 5000,
    "nothing": "",
}


@pytest.mark.parametrize("name", FORGED)
def test_what_cannot_have_been_said_is_refused(path: Path, name: str) -> None:
    forge(path, FORGED[name])
    with pytest.raises(FileFormatError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}: expected a conversation that /save wrote")
    assert KVCache.load(path).length > 10, "as a cache it can still be used"


def test_a_systems_message_comes_first(path: Path) -> None:
    forge(path, {"messages": [{"role": "system", "content": "Be short."}, *MESSAGES, *MESSAGES]})
    assert load(path).transcript.messages[0]["role"] == "system"


def test_tokens_that_the_model_does_not_have_are_refused(conversation: Conversation, path: Path) -> None:
    before = conversation.transcript
    forge(path, {"tokens": [256] * 30})
    with pytest.raises(ArgumentError, match="tokens: expected ids below 256, as of this model, got 256"):
        conversation.restore(load(path))
    assert conversation.transcript == before


def test_turns_that_a_template_wrote_shorter_again_can_be_taken_back(conversation: Conversation, path: Path) -> None:
    """A turn may begin after more tokens than there are later, where a template leaves out what answers thought."""
    copy = conversation.copy()
    said = Transcript(MESSAGES * 3, copy.transcript.tokens, (0, 900, 9))
    save(SavedConversation(said, copy.cache), path)
    assert load(path).transcript == Transcript(tuple(MESSAGES * 3), said.tokens, (0, 9, 9))


def test_a_saved_conversation_is_moved_to_the_models_device(
    conversation: Conversation, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is read onto the CPU, wherever the model is."""
    copy, moved = load(path), []

    def to(cache: KVCache, device: torch.device) -> KVCache:
        moved.append((cache, device))
        return cache

    monkeypatch.setattr(KVCache, "to", to)
    conversation.restore(copy)
    assert moved == [(copy.cache, torch.device("cpu"))]


def test_any_changed_byte_is_refused(path: Path) -> None:
    whole, draw = path.read_bytes(), random.Random(0)
    for place in draw.sample(range(len(whole)), 300):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(FileFormatError, match=f"{path}: expected"):
            load(path)


def test_a_kv_cache_without_words_is_refused_by_a_sentence(conversation: Conversation, path: Path) -> None:
    conversation.cache.save(path)
    with pytest.raises(FileFormatError, match=r"wrote the transcript into a second file\); KVCache\.load"):
        load(path)


def test_a_file_of_another_kind_is_not_replaced(conversation: Conversation, tmp_path: Path) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text('{"mine": 1}')
    save(conversation.copy(), tmp_path / "notes")
    with pytest.raises(ForeignFileError, match=str(notes)):
        save(conversation.copy(), notes)
    assert notes.read_text() == '{"mine": 1}'


def test_a_conversation_of_another_model_of_the_same_shape_is_refused(
    conversation: Conversation, of_bytes: Path, path: Path
) -> None:
    other = load_model(of_bytes)
    other.head.proj.weight.data[3, 2] += 1
    conversation = Conversation(other, load_tokenizer(of_bytes))
    conversation.ask("Hello", str, max_new_tokens=3)
    before, length = conversation.transcript, conversation.cache.length
    with pytest.raises(AttentionError, match="expected a model with the weights that made this cache"):
        conversation.restore(load(path))
    assert (conversation.transcript, conversation.cache.length) == (before, length)


def test_a_save_that_fails_keeps_the_file_that_was_there(
    conversation: Conversation, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copy = path.read_bytes(), conversation.copy()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        save(SavedConversation(Transcript((), (*copy.transcript.tokens, 1), ()), copy.cache), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
