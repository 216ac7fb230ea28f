"""Tokenizers, compared with transformers; streams of characters of several tokens; chat templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.checkpoints.tokenizers_of_text import TEMPLATE, TEXTS, byte_level, metaspace, save
from transformer import DecoderOnlyTransformer
from transformer.checkpoints import Tokenizer, load_tokenizer, save_model
from transformer.errors import ArgumentError, FileFormatError

MESSAGES = [
    {"role": "system", "content": "Be <brief> & naïve."},
    {"role": "user", "content": "  東京? "},
    {"role": "assistant", "content": "🙂"},
    {"role": "user", "content": ""},
    {"role": "user", "content": "Again"},
]


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.give(token) for token in tokens), stream.rest()]


@pytest.fixture(params=[byte_level, metaspace])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(request.param(), tmp_path)


def theirs(folder: Path, **config: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", **config
    )


@pytest.mark.parametrize("text", TEXTS[:3])
def test_tokens_and_text_are_those_of_transformers(folder: Path, text: str) -> None:
    tokenizer, other = load_tokenizer(folder), theirs(folder)
    tokens = tokenizer.encode(text)
    assert tokens == other.encode(text)
    assert tokenizer.encode(text, begins=False) == tokens[1:]
    assert tokenizer.decode(tokens) == other.decode(tokens, skip_special_tokens=True)
    assert tokenizer.stop_tokens == (other.eos_token_id,)


@pytest.mark.parametrize("text", TEXTS[:3])
def test_a_stream_gives_whole_characters(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode(text)
    pieces = streamed(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 4, "as they come, not at the end"


def test_an_unfinished_character_comes_at_the_end(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode("x 東")[:-1]
    *pieces, rest = streamed(tokenizer, tokens)
    assert "".join(pieces).strip() == "x"
    assert rest.endswith("\N{REPLACEMENT CHARACTER}")


def test_no_text_is_cut_to_the_length_of_training(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    assert load_tokenizer(save(backend, tmp_path)).encode(TEXTS[0]) == byte_level().encode(TEXTS[0]).ids


def test_bytes_that_are_no_text_are_replaced(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("x\udcff") == tokenizer.encode("x\N{REPLACEMENT CHARACTER}")


# --- chats --------------------------------------------------------------------------------------------------------


def in_config(folder: Path, template: str) -> Path:
    return save(byte_level(), folder, chat_template=template)


def by_name(folder: Path, template: str) -> Path:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": template}]
    return save(byte_level(), folder, chat_template=named)


def in_a_file(folder: Path, template: str) -> Path:
    save(byte_level(), folder, chat_template="older")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.mark.parametrize("put", [in_config, by_name, in_a_file])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_chat_is_written_as_transformers_writes_it(
    tmp_path: Path, put: Callable[[Path, str], Path], count: int
) -> None:
    tokenizer = load_tokenizer(put(tmp_path, TEMPLATE))
    other = theirs(tmp_path, chat_template=TEMPLATE)
    text = other.apply_chat_template(MESSAGES[:count], tokenize=False, add_generation_prompt=True)
    assert "<brief>" in text
    assert tokenizer.template is not None
    assert tokenizer.template.render(MESSAGES[:count]) == text
    assert tokenizer.encode_chat(MESSAGES[:count]) == other.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (TEMPLATE, "no such role: bad"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(messages[0]) }}", "append.*unsafe"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
    ],
)
def test_what_a_template_refuses_or_must_not_do_is_refused(tmp_path: Path, template: str, complaint: str) -> None:
    tokenizer = load_tokenizer(in_config(tmp_path, template))
    with pytest.raises(ArgumentError, match=complaint):
        tokenizer.encode_chat([{"role": "bad", "content": ""}])


def test_a_model_without_a_template_has_no_chats(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(byte_level(), tmp_path))
    assert tokenizer.template is None
    with pytest.raises(ArgumentError, match="no chat template"):
        tokenizer.encode_chat(MESSAGES)


# --- bytes, and what is none of these -----------------------------------------------------------------------------


@pytest.fixture
def of_bytes(tmp_path: Path) -> Tokenizer:
    save_model(DecoderOnlyTransformer(256, 8, 2, 8, 1), tmp_path / "model")
    return load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize("text", TEXTS[:3])
def test_a_model_of_256_tokens_reads_bytes(of_bytes: Tokenizer, text: str) -> None:
    tokens = of_bytes.encode(text)
    assert tokens == list(text.encode())
    assert of_bytes.decode(tokens) == "".join(streamed(of_bytes, tokens)) == text
    assert (of_bytes.stop_tokens, of_bytes.template) == ((), None)


def test_bytes_that_are_no_text_stay_what_they_are(of_bytes: Tokenizer) -> None:
    raw = b"a\xff\xe6\x9d"
    assert of_bytes.encode(raw.decode("utf-8", "surrogateescape")) == list(raw)
    assert streamed(of_bytes, list(raw)) == ["a", "\N{REPLACEMENT CHARACTER}", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_model_of_more_tokens_needs_its_tokenizer(tmp_path: Path) -> None:
    save_model(DecoderOnlyTransformer(300, 8, 2, 8, 1), tmp_path / "model")
    with pytest.raises(FileFormatError, match=r"model: expected a tokenizer\.json, since the model has 300 tokens"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
        ("chat_template.jinja", "{{ messages"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(FileFormatError, match=name.replace(".", r"\.")):
        load_tokenizer(tmp_path)
