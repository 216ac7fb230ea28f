"""Tokenizers that would use too much time or memory, or that panic: refused with the file's name."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from tests.checkpoints.tokenizers_of_text import byte_level, metaspace, save
from transformer.checkpoints import load_tokenizer
from transformer.checkpoints.tokenizer_patterns import unbounded_reason
from transformer.errors import ArgumentError, FileFormatError

RE = "Regex"

IN_USE = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}",
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+(?:(?i:'s|'t|'re))?| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s+(?!\S)|\s",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r" ?[^(\s|[.,!?…。、])]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r" {2,}",
    r"[\r\n]",
    r"(?:\p{L}\p{M}?)+",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    r"(a+)?b",
    r"\((a+)\)",
    r"(?>a+)+b",
    r"(a+)++(b+)++c",
    r"((?=a+)b)*c",
    r"[*+](?:[+]|x)",
    r"a*b*c*d*e*",
    r"a*b*(?:c|d)?",
    r"a++b++c++d",
    r"(?i)ab+|c(?:d(?i)e|f)*",
    r"[[:alpha:]]+|[[:^space:]x]|[]a]+|[a[]]b]|[^^]+|[a&&[^b]]",
    r"(?<two>.)\k<two>",
    r"(.)\1|a",
    r"(?:a|b){3}|(?:a|b)(?:c|d)(?:e|f)g?h?i?j",
    "|".join("abcdefgh" * 2000),
    "a?" * 30,
    r"(?i)[a-z]|\p{L}+\d|[a-z]+",
    r"(?i:[a-z])[a-z]+b",
    r"\x{61}+b|\x41\u2581\0",
    "",
]

NEVER_ENDING = [
    r"(a+)+$",
    r"(a|a)*$",
    r"(a*)*b",
    r"(?:a+a+)+y",
    r"(a?a)+b",
    r"(?i:a{1,3})+b",
    r"(a{2,}){2,}b",
    r"x|(?:\w+\s?)*\.",
    r"((a)(b|c)+)*d",
    r"((a+))*b",
    r"(?<name>a+)+b",
    r"a{1,3}+b",
    r"(a{1,20}){1,20}b",
    r"(a+){20}b",
    r"a++?(a+)*?b",
    r"[a]b](x+)+z",
    r"([a-c[x]]+)+z",
    r"\((a+)+\)",
    r"a*a*b",
    r"(?:a*b)(?:c*d*)e*f",
    r"(a|a){2,}+b",
    r"(?:a*(?i)b|a*)c*d",
    r"[^^](a|a)+b]",
    r"[a[]]](a|a)+b]",
    r"(a*)\1",
    r"(a)(?:\1|\1)*b",
    r"(?<x>a*)\k<x>",
    r"(\w{2,}){20}",
    r"a*?b*+c",
    r"a*(?>b+)c",
    r"a*(?=b+)c",
    r"a(.){2,}{20}",
    r"(?:a|aa){20}",
    "(?:a|aa)" * 20 + "b",
    "a?" * 30 + "b",
    "a{1,9}" * 9 + "b",
    r"(?i)[[:alpha:]]*d",
    r"(?i:x|[\p{L}]+(?:d))",
    "(?i)" + "[a-z]" * 20,
]

NOT_SUPPORTED = [
    r"(?<x>(?:a|aa)\g<x>?)[b-z]{2}",
    r"(?<x>a\g<x>*)[b-z]{2}",
    r"(?<x>a\g'x'?)b",
    r"(?<x>a\g<-1>?)b",
    r"(?<x>a)\k<x+0>",
    r"(?<x>a)\k'x'",
    r"(?~(?:a|a)+b)c",
    r"(a)?(?(1)b|c)",
    r"(a|a)(?#)+b",
    r"(?x)(a|a) +b",
    r"(?x-i:(a|a) +b)",
    r"(?L)(a|a)+",
    r"(?'x'a)b",
    r"(?{x})a",
    r"(*MAX{3})a",
    r"\c[(a|a)+b",
    r"[\c][](a|a)+b]",
    r"\M-\C-[(a|a)+b",
    r"[[:no name](a|a)+b]",
    r"a\Kb",
]


def changed(folder: Path, **changes: object) -> Path:
    content = json.loads(byte_level().to_str())
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content | changes), encoding="utf-8")
    return folder


def replace(old: str, new: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def sequence(*rules: dict) -> dict:
    return {"type": "Sequence", "normalizers": list(rules)}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def charsmap(longest: int) -> dict:
    table = (4).to_bytes(4, "little") + bytes(4) + b"x\0" + b"y" * longest + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


@pytest.mark.parametrize("pattern", IN_USE)
def test_patterns_in_use_are_taken(tmp_path: Path, pattern: str) -> None:
    assert unbounded_reason(pattern) is None
    load_tokenizer(changed(tmp_path, pre_tokenizer=split(pattern))).encode("It's 東京, naïve!  \n\n x123" * 3)


@pytest.mark.parametrize("pattern", NOT_SUPPORTED)
def test_patterns_with_what_may_hide_a_loop_are_refused(pattern: str) -> None:
    assert "which is not supported" in (unbounded_reason(pattern) or "")


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: .* with '.*g<x>.*' at character 6, which is not supp"):
        load_tokenizer(changed(tmp_path, pre_tokenizer=split(r"(?<x>a\g<x>*)[b-z]{2}")))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", NEVER_ENDING)
def test_patterns_that_go_back_without_end_are_refused(tmp_path: Path, pattern: str) -> None:
    assert unbounded_reason(pattern) is not None
    for changes in (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("a"), split(pattern)]}},
        {"normalizer": sequence(replace(pattern, "", "Regex"))},
        {"decoder": replace(pattern, "", "Regex")},
    ):
        with pytest.raises(FileFormatError, match=r"tokenizer\.json: expected patterns with a bounded search time"):
            load_tokenizer(changed(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": sequence({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))},
        {"normalizer": sequence(replace("``", '"'), {"type": "NFKD"}, {"type": "Lowercase"}, replace(" +", "", RE))},
        {"normalizer": sequence(*[{"type": "NFKD"}] * 50), "pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}},
        {"normalizer": sequence(*[replace("ab", "a")] * 50)},
        {"decoder": {"type": "Sequence", "decoders": [replace("▁", " "), {"type": "Fuse"}]}},
    ],
)  # fmt: skip
def test_rules_in_use_are_taken(tmp_path: Path, changes: dict) -> None:
    load_tokenizer(changed(tmp_path, **changes)).encode("some text")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": sequence(*[replace("a", "aaaaaaaaaa")] * 12)},
        {"normalizer": sequence(*[replace("a", "aa")] * 60)},
        {"normalizer": sequence(*[replace("a?", "b", "Regex")] * 60)},
        {"normalizer": replace("a", "a" * 10**6)},
        {"normalizer": sequence(*[{"type": "Prepend", "prepend": "x" * 100}] * 3)},
        {"normalizer": sequence(*[{"type": "ByteLevel"}] * 60)},
        {"normalizer": charsmap(10**5)},
        {"normalizer": sequence(sequence(*[replace("a", "aa")] * 6), sequence(*[replace("a", "aa")] * 7))},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False,
                                                                 "trim_offsets": True}] * 60}},
        {"decoder": {"type": "Sequence", "decoders": [replace("a", "aa")] * 60}},
    ],
)  # fmt: skip
def test_rules_that_lengthen_a_text_without_end_are_refused(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: expected rules that make a text at most"):
        load_tokenizer(changed(tmp_path, **changes))


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[" * 10**6,
        '{"model":' * 10**5,
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}',
        '{"version": "1.0", "model": {"type": "Unigram", "vocab": [], "unk_id": 5}}',
        b"\xff\xfe\x00",
    ],
)
def test_what_is_no_tokenizer_names_the_file(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: expected a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_file_is_read_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformer.checkpoints.tokenizer.MAX_FILE_BYTES", 1000)
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: expected at most 1,000 bytes"):
        load_tokenizer(save(byte_level(), tmp_path))


def test_a_token_is_no_longer_than_any_needs(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a" * 20_000: 0, "b": 1}, unk_token="b"))
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: expected tokens of at most .* got a token of 20,000"):
        load_tokenizer(save(backend, tmp_path))


def test_a_panic_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A search that goes back gives up after some millions of steps, by a panic.
    monkeypatch.setattr("transformer.checkpoints.tokenizer.check_rules", lambda *_: None)
    tokenizer = load_tokenizer(changed(tmp_path, pre_tokenizer=split("(a|a)*$")))
    for _ in range(2):
        with pytest.raises(FileFormatError, match=r"tokenizer\.json: expected a tokenizer; it could not be .* run"):
            tokenizer.encode("a" * 40 + "!")


def test_what_the_package_raises_names_the_file(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="none"))
    tokenizer = load_tokenizer(save(backend, tmp_path))
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: expected a tokenizer"):
        tokenizer.encode("b")


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("tokens", [[-1], [2**32], [2**70], [1.5], ["a"], 5, None, [None], [[1]]])
def test_what_are_no_ids_is_refused(tmp_path: Path, make, tokens: object) -> None:
    with pytest.raises(ArgumentError, match="tokens: expected a list of ids"):
        load_tokenizer(save(make(), tmp_path)).decode(tokens)


@pytest.mark.parametrize("text", [None, 5, b"text", ["text"]])
def test_what_is_no_text_is_refused(tmp_path: Path, text: object) -> None:
    with pytest.raises(ArgumentError, match="text: expected a str"):
        load_tokenizer(save(byte_level(), tmp_path)).encode(text)


def test_ids_of_any_integer_type_are_decoded(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(byte_level(), tmp_path))
    tokens = tokenizer.encode("some text")
    assert tokenizer.decode(np.array(tokens)) == "some text" == tokenizer.decode(tuple(tokens))
