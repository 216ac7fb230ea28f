"""Special and added tokens and tokenizer_config.json, compared with transformers on the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.checkpoints.tokenizers_of_text import byte_level
from transformer.checkpoints import load_tokenizer
from transformer.errors import FileFormatError

TEXT = "The fox , it 's me . <|im_end|> ok </s> <new>! naïve"
HELLO = [{"role": "user", "content": "Hello"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NAMES = (
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ im_token }}|{{ sound_token }}|{{ additional_special_tokens }}"
)


def flags(content: str, **changed: bool) -> dict:
    usual = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content} | usual | changed


def added(content: str, **changed: bool) -> dict:
    return {"__type": "AddedToken"} | flags(content, **changed)


def written(folder: Path, backend: Tokenizer, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def words() -> Tokenizer:
    """No byte pair encoding: spaces before punctuation are taken out of what it decodes, if asked for."""
    vocabulary = [
        "[UNK]",
        "<s>",
        "</s>",
        *["do", "n't", "it", "'s", "I", "'m", "we", "'ve", "they", "'re", ",", ".", "!", "?", "'", "ok", "x"],
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def padded() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_padding(pad_token="</s>", pad_id=1, length=30)
    return tokenizer


def without_post_processor() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


CASES: list[tuple[Callable[[], Tokenizer], dict[str, object]]] = [
    (byte_level, {}),
    (byte_level, {"tokenizer_config": TOKENS}),
    (byte_level, {"tokenizer_config": {"bos_token": added("<s>"), "eos_token": added("</s>"), "pad_token": None}}),
    (byte_level, {"special_tokens_map": TOKENS}),
    (byte_level, {"special_tokens_map": {"eos_token": flags("</s>"), "pad_token": "<new>"}}),
    # what special_tokens_map.json says wins, unless there is an added_tokens_decoder
    (byte_level, {"tokenizer_config": TOKENS, "special_tokens_map": {"eos_token": "<s>", "bos_token": None}}),
    (
        byte_level,
        {"tokenizer_config": TOKENS | {"added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "<s>"}},
    ),
    (byte_level, {"tokenizer_config": TOKENS | {"additional_special_tokens": ["<|im_end|>", "<new>"]}}),
    (byte_level, {"tokenizer_config": TOKENS | {"additional_special_tokens": [added("<|im_end|>", rstrip=True)]}}),
    (byte_level, {"special_tokens_map": TOKENS | {"additional_special_tokens": ["<|im_end|>"]}}),
    (
        byte_level,
        {
            "tokenizer_config": TOKENS | {"extra_special_tokens": ["<new>"]},
            "special_tokens_map": {"additional_special_tokens": ["<|im_end|>"]},
        },
    ),
    (
        byte_level,
        {
            "tokenizer_config": TOKENS | {"extra_special_tokens": ["<new>"]},
            "special_tokens_map": {"extra_special_tokens": ["<|im_end|>", "<new>"]},
        },
    ),
    (byte_level, {"tokenizer_config": TOKENS | {"extra_special_tokens": {"im_token": "<|im_end|>"}}}),
    (byte_level, {"tokenizer_config": TOKENS | {"sound_token": "<new>", "im_token": added("<|im_end|>")}}),
    (byte_level, {"tokenizer_config": TOKENS | {"sound_token": None, "add_prefix_token": True}}),
    (byte_level, {"tokenizer_config": TOKENS | {"added_tokens_decoder": {"300": flags("ok"), "9": flags("fox")}}}),
    (
        byte_level,
        {
            "tokenizer_config": TOKENS
            | {
                "pad_token": "<new>",
                "added_tokens_decoder": {
                    "302": flags("<new>", special=False, lstrip=True),
                    "301": flags("it", special=False, single_word=True),
                    "300": flags(" me ", special=False, normalized=True),
                },
            }
        },
    ),
    (byte_level, {"tokenizer_config": TOKENS, "added_tokens": {"ok": 301, "<|im_end|>": 300}}),
    (
        byte_level,
        {"tokenizer_config": TOKENS | {"added_tokens_decoder": {}}, "added_tokens": {"ok": 301, "<|im_end|>": 300}},
    ),
    (byte_level, {"tokenizer_config": TOKENS | {"add_bos_token": False, "add_eos_token": True}}),
    (without_post_processor, {"tokenizer_config": TOKENS | {"add_bos_token": True, "add_eos_token": True}}),
    (byte_level, {"tokenizer_config": TOKENS | {"split_special_tokens": True}}),
    (byte_level, {"tokenizer_config": TOKENS | {"clean_up_tokenization_spaces": True}}),
    (padded, {"tokenizer_config": TOKENS}),
    (padded, {"tokenizer_config": TOKENS | {"pad_token": "<new>"}}),
    (words, {"tokenizer_config": TOKENS | {"clean_up_tokenization_spaces": True}}),
    (words, {"tokenizer_config": TOKENS | {"clean_up_tokenization_spaces": False}}),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_files_are_read_as_transformers_reads_them(tmp_path: Path, number: int) -> None:
    make, files = CASES[number]
    files = files | {"tokenizer_config": files.get("tokenizer_config", {}) | {"chat_template": NAMES}}
    folder = written(tmp_path, make(), **files)
    ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    theirs._tokenizer.no_padding()
    tokens = ours.encode(TEXT)
    assert tokens == theirs.encode(TEXT)
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    assert ours.stop_tokens == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.template.render(HELLO) == theirs.apply_chat_template(HELLO, tokenize=False)


STRIP = flags("<x>", rstrip=True)
KEPT: list[tuple[dict | None, dict[str, object]]] = [
    # a token of tokenizer.json is found as it says there, by whatever name and flags other files have it
    (STRIP, {"tokenizer_config": {"bos_token": "<x>"}}),
    (flags("<x>", lstrip=True), {"tokenizer_config": {"bos_token": added("<x>")}}),
    (flags("<x>", single_word=True), {"special_tokens_map": {"eos_token": flags("<x>", rstrip=True)}}),
    (flags("<x>"), {"tokenizer_config": {"bos_token": added("<x>", rstrip=True)}}),
    (flags("<x>"), {"tokenizer_config": {"bos_token": added("<x>", lstrip=True), "added_tokens_decoder": {}}}),
    (flags("<x>"), {"tokenizer_config": {"im_token": added("<x>", single_word=True)}}),
    (STRIP, {"tokenizer_config": {"extra_special_tokens": {"im_token": "<x>"}}}),
    (STRIP, {"tokenizer_config": {"additional_special_tokens": ["<x>"]}}),
    (STRIP, {"tokenizer_config": {"extra_special_tokens": [added("<x>", lstrip=True)]}}),
    (flags("<x>", normalized=True), {"tokenizer_config": {"bos_token": added("<X>", rstrip=True), "pad_token": "<x>"}}),
    # unless they give it an id
    (STRIP, {"tokenizer_config": {"bos_token": "<x>", "added_tokens_decoder": {"301": flags("<x>", lstrip=True)}}}),
    (STRIP, {"tokenizer_config": {"bos_token": "<x>"}, "added_tokens": {"<x>": 400}}),
    (STRIP, {"tokenizer_config": {"bos_token": added("<y>")}, "added_tokens": {"<x>": 300, "<y>": 301}}),
    (STRIP, {"tokenizer_config": {"bos_token": added("<y>", rstrip=True)}, "added_tokens": {"<y>": 300}}),
    # it becomes special by a name, not by a list
    (flags("<x>", special=False), {"tokenizer_config": {"bos_token": "<x>"}}),
    (flags("<x>", special=False), {"tokenizer_config": {"bos_token": "<x>", "added_tokens_decoder": {}}}),
    (flags("<x>", special=False), {"tokenizer_config": {"additional_special_tokens": ["<x>"]}}),
    # objects in lists are special where they say so
    (None, {"tokenizer_config": {"additional_special_tokens": [{"__type": "AddedToken", "content": "<x>"}]}}),
    (None, {"tokenizer_config": {"additional_special_tokens": [added("<x>", special=False)]}}),
    (None, {"tokenizer_config": {"additional_special_tokens": [added("<x>")], "extra_special_tokens": []}}),
    (None, {"tokenizer_config": {"additional_special_tokens": [added("<x>", special=False)], "pad_token": "<x>"}}),
    (None, {"special_tokens_map": {"extra_special_tokens": [{"content": "<x>", "rstrip": True}]}}),
    # of a token by several names the last says how it is found, where they differ
    (None, {"tokenizer_config": {"eos_token": added("<x>", rstrip=True), "bos_token": "<x>"}}),
    (None, {"tokenizer_config": {"eos_token": "<x>", "bos_token": added("<x>", rstrip=True), "unk_token": "<x>"}}),
    (None, {"tokenizer_config": {"eos_token": "<x>", "extra_special_tokens": [added("<x>", lstrip=True)]}}),
    # names that only this model has
    (STRIP, {"tokenizer_config": {"im_token": "<y>"}, "special_tokens_map": {"im_token": "<x>", "sound_token": "<w>"}}),
    (STRIP, {"tokenizer_config": {"im_token": added("<y>")}, "special_tokens_map": {"im_token": "<w>"}}),
    (STRIP, {"tokenizer_config": {"sound_token": "<y>"}, "special_tokens_map": {"sound_token": None}}),
    (STRIP, {"tokenizer_config": {"model_specific_special_tokens": {"im_token": "<y>"}}}),
    (None, {"tokenizer_config": {"im_token": None}, "special_tokens_map": {"sound_token": "<x>", "im_token": "<y>"}}),
    (None, {"tokenizer_config": {"extra_special_tokens": {"im_token": "<x>", "eos_token": "<y>"}, "pad_token": "<w>"}}),
    # two lists
    (STRIP, {"tokenizer_config": {"extra_special_tokens": ["<y>"], "additional_special_tokens": ["<w>"]}}),
    (STRIP, {"tokenizer_config": {"extra_special_tokens": ["<y>"], "additional_special_tokens": {"im_token": "<w>"}}}),
    (
        STRIP,
        {"tokenizer_config": {"extra_special_tokens": None}, "special_tokens_map": {"extra_special_tokens": ["<y>"]}},
    ),
    (STRIP, {"tokenizer_config": {"extra_special_tokens": {"im_token": "<y>"}, "additional_special_tokens": ["<w>"]}}),
]


@pytest.mark.slow
@pytest.mark.parametrize("padding", [None, "<x>", "<p>"])
@pytest.mark.parametrize("number", range(len(KEPT)))
def test_tokens_are_found_as_transformers_finds_them(tmp_path: Path, number: int, padding: str | None) -> None:
    token, files = KEPT[number]
    backend = byte_level()
    backend.normalizer = normalizers.Lowercase()
    if token is not None:
        backend.add_tokens([AddedToken(**token)])
    if padding is not None:
        backend.enable_padding(pad_token=padding)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": NAMES} | files.get("tokenizer_config", {})
    folder = written(tmp_path, backend, **files | {"tokenizer_config": config})
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    theirs._tokenizer.no_padding()
    for text in ("a<x>  b  <x> a<x>b <X>  <p> <s> </s>", "a<y>  b  <w> a<y>b <Y>  <x>"):
        tokens = ours.encode(text)
        assert tokens == theirs.encode(text)
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    assert ours.template.render(HELLO) == theirs.apply_chat_template(HELLO, tokenize=False)


def test_a_named_token_of_tokenizer_json_strips_as_it_says_there(tmp_path: Path) -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken(**STRIP)])
    tokenizer = load_tokenizer(written(tmp_path, backend, tokenizer_config={"bos_token": "<x>"}))
    assert tokenizer.encode("a<x>  b", begins=False) == tokenizer.encode("a<x>b", begins=False)


@pytest.mark.parametrize("corrupt", [False, True])
@pytest.mark.parametrize("make", [words, byte_level])
@pytest.mark.parametrize(
    "text",
    [
        "do n't , it 's ok . I 'm x ! they 're ?",
        "we 've ' x ' ' ' . ' ok do n ' t n't 's 's x '",
        ". , ! ? ' n't 'm 's 've 're",
        "x ' ' ' ' 's ' , ok ' ' n't x ' do",
    ],
)
def test_spaces_are_taken_out_alike_at_once_and_in_pieces(
    tmp_path: Path, text: str, make: Callable[[], Tokenizer], corrupt: bool
) -> None:
    key = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    config = TOKENS | {"clean_up_tokenization_spaces": True, key: corrupt}
    folder = written(tmp_path, make(), tokenizer_config=config)
    ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = ours.encode(text)
    stream = ours.stream()
    pieces = [*(stream.give(token) for token in tokens), stream.rest()]
    assert ours.decode(tokens) == "".join(pieces) == theirs.decode(tokens, skip_special_tokens=True)
    assert sum(map(bool, pieces)) > 1, "as they come, not at the end"


def test_tokens_are_not_left_out_at_random(tmp_path: Path) -> None:
    backend = byte_level()
    backend.model.dropout = 0.5
    tokenizer = load_tokenizer(written(tmp_path, backend))
    assert all(tokenizer.encode(TEXT) == byte_level().encode(TEXT).ids for _ in range(5))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer_config", {"eos_token": 5}, "eos_token: expected a token"),
        ("tokenizer_config", {"eos_token": {"text": "</s>"}}, "eos_token: expected a token"),
        ("tokenizer_config", {"eos_token": flags("</s>", lstrip="yes")}, "eos_token: expected true or false"),
        ("tokenizer_config", {"additional_special_tokens": [1]}, "additional_special_tokens: expected a token"),
        ("tokenizer_config", {"extra_special_tokens": "x"}, "extra_special_tokens: expected a list or an object"),
        ("tokenizer_config", {"extra_special_tokens": {"a": []}}, "a: expected a token"),
        ("tokenizer_config", {"added_tokens_decoder": []}, "added_tokens_decoder: expected an object"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": flags("a")}}, "added_tokens_decoder: expected tokens"),
        ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: flags("a")}}, "added_tokens_decoder: expected"),
        ("tokenizer_config", {"added_tokens_decoder": {"5": "a"}}, "added_tokens_decoder: expected tokens as objects"),
        ("tokenizer_config", {"clean_up_tokenization_spaces": "no"}, "clean_up_tokenization_spaces: expected true"),
        ("tokenizer_config", {"chat_template": 5}, "chat_template: expected a text"),
        ("tokenizer_config", {"chat_template": [{"template": "x"}]}, "chat_template: expected a text"),
        ("tokenizer_config", {"chat_template": [{"name": ["x"], "template": "x"}]}, "chat_template: expected a text"),
        ("tokenizer_config", {"chat_template": {"default": 1}}, "chat_template: expected a text"),
        ("special_tokens_map", {"eos_token": [1]}, "eos_token: expected a token"),
        ("special_tokens_map", [], "expected a JSON object"),
        ("added_tokens", {"ok": "5"}, "ok: expected an id"),
        ("added_tokens", {"ok": 1.5}, "ok: expected an id"),
    ],
)
def test_what_cannot_be_read_names_file_and_key(tmp_path: Path, name: str, content: object, complaint: str) -> None:
    with pytest.raises(FileFormatError, match=rf"{name}\.json.*{complaint}"):
        load_tokenizer(written(tmp_path, byte_level(), **{name: content}))


def test_tokens_without_number_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformer.checkpoints.special_tokens.MAX_ADDED_TOKENS", 10)
    with pytest.raises(FileFormatError, match=r"at most 10 tokens, got 11"):
        load_tokenizer(written(tmp_path, byte_level(), added_tokens={f"<{i}>": 300 + i for i in range(11)}))
