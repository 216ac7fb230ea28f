"""Special and added tokens of a checkpoint: tokenizer_config.json, special_tokens_map.json and added_tokens.json.

They are read as transformers 5 reads them. Where tokenizer_config.json has `added_tokens_decoder` the two older files
are passed over; else what special_tokens_map.json says of a name wins. `add_bos_token` and `add_eos_token` say nothing
beside a tokenizer.json, which has its own rule for what stands around a text.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FileFormatError
from .documents import read_object
from .folder import Folder
from .limits import MOST_ADDED_TOKENS

TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

CLEAN_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Of a token that is added: how it is found in a text, and whether it is left out of what is decoded."""


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary: its text, and those of `FLAGS` that are said."""

    content: str
    flags: Mapping[str, bool]


@dataclass(frozen=True)
class SpecialTokens:
    """What the files say: tokens by name, tokens to be added in this order, and how text is read and written.

    `named` are what a chat template may name. `split` reads the text of special tokens as any other text; `clean_up`
    takes out spaces before punctuation, of byte pair encodings only where `clean_up_bpe` says so as well.
    """

    named: Mapping[str, str]
    added: tuple[AddedToken, ...]
    split: bool = False
    clean_up: bool = False
    clean_up_bpe: bool = False


def read_special_tokens(folder: Folder) -> SpecialTokens:
    """What a folder's files say. Raises FileFormatError, naming file and key, for what they should not hold."""
    reader = _Reader(folder)
    config = reader.open(TOKENIZER_CONFIG)
    reader.take_all(config)
    flags = {
        "split": reader.flag(config, "split_special_tokens"),
        "clean_up": reader.flag(config, "clean_up_tokenization_spaces"),
        "clean_up_bpe": reader.flag(config, CLEAN_UP_BPE),
    }
    if "added_tokens_decoder" in config:
        reader.take_decoder(config["added_tokens_decoder"])
    else:
        reader.take_map(reader.open(SPECIAL_TOKENS))
        reader.take_added(reader.open(ADDED_TOKENS))
    return SpecialTokens({name: token.content for name, token in reader.named.items()}, reader.in_order(), **flags)


class _Reader:
    """What was read so far, of one file after the other."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.named: dict[str, AddedToken] = {}
        self.extra: list[AddedToken] = []
        self.numbered: dict[int, AddedToken] = {}

    def open(self, name: str) -> dict[str, Any]:
        """The content of a file, which is then the one that is read; empty where there is none."""
        self.file = self._folder.path / name
        file = self._folder.find(name)
        return {} if file is None else read_object(file)

    def take_all(self, config: Mapping[str, Any]) -> None:
        """The names of tokenizer_config.json; of those that only this model has, objects first, as they get their ids
        in this order."""
        own = [key for key in config if key not in NAMES and key.endswith("_token")]
        for key in (
            *(key for key in NAMES if key in config),
            *(key for key in own if _is_token(config[key])),
            *(key for key in own if isinstance(config[key], str)),
        ):
            self._name(key, config[key])
        self._take_extra(config)

    def take_map(self, content: Mapping[str, Any]) -> None:
        """special_tokens_map.json: what it says of a name wins."""
        for key, value in content.items():
            if key in NAMES or (key.endswith("_token") and isinstance(value, str | dict)):
                self._name(key, value)
        before, self.extra = self.extra, []
        self._take_extra(content)
        if before:
            new = self.extra if "extra_special_tokens" in content else []
            self.extra = list({token.content: token for token in (*before, *new)}.values())

    def take_added(self, content: Mapping[str, Any]) -> None:
        """added_tokens.json: ids by text."""
        special = {token.content for token in (*self.named.values(), *self.extra)}
        for text, number in content.items():
            if type(number) is not int:
                raise self._refusal(text, "an id", number)
            flags = {"normalized": text not in special, "special": text in special}
            self.numbered[number] = AddedToken(text, flags)

    def take_decoder(self, content: object) -> None:
        """`added_tokens_decoder`: tokens by id."""
        if not isinstance(content, Mapping):
            raise self._refusal("added_tokens_decoder", "an object", content)
        for number, value in content.items():
            if not number.isdecimal() or len(number) > 10 or not isinstance(value, Mapping):
                raise self._refusal("added_tokens_decoder", "tokens as objects, by id", {number: value})
            self.numbered[int(number)] = self._token("added_tokens_decoder", value)

    def in_order(self) -> tuple[AddedToken, ...]:
        """Tokens to be added: those with ids first, in their order; then special ones that are not among them."""
        names = sorted(self.named, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES))
        by_name = {self.named[name].content: self.named[name] for name in names}
        tokens = {token.content: token for _, token in sorted(self.numbered.items())}
        for token in (*by_name.values(), *self.extra):
            tokens.setdefault(token.content, token)
        if len(tokens) > MOST_ADDED_TOKENS:
            raise FileFormatError(f"{self.file}: expected at most {MOST_ADDED_TOKENS:,} tokens, got {len(tokens):,}")
        return tuple(
            AddedToken(token.content, {**token.flags, "special": True}) if token.content in by_name else token
            for token in tokens.values()
        )

    def flag(self, config: Mapping[str, Any], key: str) -> bool:
        """True or false; false where nothing is said."""
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._refusal(key, "true or false", value)
        return bool(value)

    def _take_extra(self, content: Mapping[str, Any]) -> None:
        key = "extra_special_tokens" if content.get("extra_special_tokens") else "additional_special_tokens"
        extra = content.get(key) or []
        if isinstance(extra, Mapping):
            for name, value in extra.items():
                self._name(name, value)
        elif isinstance(extra, list):
            self.extra += [self._special(key, value) for value in extra]
        else:
            raise self._refusal(key, "a list or an object", extra)

    def _name(self, key: str, value: object) -> None:
        if value is None:
            self.named.pop(key, None)
        else:
            self.named[key] = self._special(key, value)

    def _special(self, key: str, value: object) -> AddedToken:
        token = AddedToken(value, {}) if isinstance(value, str) else self._token(key, value)
        return AddedToken(token.content, {**token.flags, "special": True})

    def _token(self, key: str, value: object) -> AddedToken:
        content = value.get("content") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(content, str):
            raise self._refusal(key, "a token, as text or as an object with its content", value)
        flags = {name: value[name] for name in FLAGS if value.get(name) is not None}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise self._refusal(key, "true or false for how the token is found", value)
        return AddedToken(content, flags)

    def _refusal(self, key: str, expected: str, value: object) -> FileFormatError:
        return FileFormatError(f"{self.file}, {key}: expected {expected}, got {reprlib.repr(value)}")


def _is_token(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("__type") == "AddedToken"
