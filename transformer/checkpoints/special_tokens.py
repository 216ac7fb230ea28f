"""Special and added tokens of a checkpoint: tokenizer_config.json, special_tokens_map.json and added_tokens.json.

They are read as transformers 5 reads them. If tokenizer_config.json has `added_tokens_decoder`, the two older files are
ignored; else special_tokens_map.json has precedence. `add_bos_token` and `add_eos_token` have no effect, because
tokenizer.json has its own rule for the tokens around a text.
"""

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FileFormatError
from .documents import read_object
from .folder import CONFIG, Folder
from .limits import MAX_ADDED_TOKENS
from .tokenizer_classes import class_tokens

TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

CLEAN_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"

NEWER, OLDER, OWN = "extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"
"""Keys of further tokens: lists, in two versions, or names that only one model has."""

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Flags of an added token: how it is matched in a text, and whether decoding leaves it out."""


@dataclass(frozen=True)
class AddedToken:
    """A token outside of the vocabulary: its text and its given `FLAGS`. `is_text`: the file has only the text."""

    content: str
    flags: Mapping[str, bool]
    is_text: bool = False

    @property
    def meaning(self) -> tuple[object, ...]:
        """A key that is equal for tokens with the same flags, given or by default; a token as text has another key."""
        defaults = {"normalized": not self.flags.get("special", False)}
        return (self.content, self.is_text, *(self.flags.get(name, defaults.get(name, False)) for name in FLAGS))


@dataclass(frozen=True)
class SpecialTokens:
    """Content of the files: tokens by name, tokens to add in this order, and options of encoding and decoding.

    `named`: tokens that a chat template can use. `split`: the text of a special token is encoded like other text.
    `clean_up`: decoding removes spaces before punctuation; for byte pair encodings only if `clean_up_bpe` is set too.
    """

    named: Mapping[str, str]
    added: tuple[AddedToken, ...]
    split: bool = False
    clean_up: bool = False
    clean_up_bpe: bool = False


def read_special_tokens(folder: Folder, present: Mapping[int, AddedToken], padding: str | None) -> SpecialTokens:
    """The special and added tokens of a folder.

    `present`: added tokens of its tokenizer.json, by id, which stay unless another file gives an id to the same token.
    `padding`: the padding token of its tokenizer.json. Raises FileFormatError, with file and key, for invalid content.
    """
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
        reader.numbered |= present
    defaults = class_tokens(config, reader.open(CONFIG), {token.content for token in present.values()})
    named = reader.by_name(padding, defaults)
    added = reader.to_add(named.values(), present.values())
    return SpecialTokens({name: token.content for name, token in named.items()}, added, **flags)


class _Reader:
    """State of reading the files in sequence."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        # A name with null has no token and gets no default.
        self._named: dict[str, AddedToken | None] = {}
        # Names that only this model has: text in tokenizer_config.json has precedence over objects and over the map.
        self._own: dict[str, AddedToken | None] = {}
        self._own_text: dict[str, AddedToken] = {}
        self._extra: dict[str, list[AddedToken]] = {}
        self._objects: list[AddedToken] = []
        self._by_text: dict[str, AddedToken] = {}
        self.numbered: dict[int, AddedToken] = {}

    def open(self, name: str) -> dict[str, Any]:
        """The content of a file, which becomes the current file; empty if there is no such file."""
        self.file = self._folder.path / name
        file = self._folder.find(name)
        return {} if file is None else read_object(file)

    def take_all(self, config: Mapping[str, Any]) -> None:
        """The names and further tokens of tokenizer_config.json."""
        for key, value in config.items():
            if key in NAMES:
                self._named[key] = None if value is None else self._stated(key, value)
            elif key.endswith("_token") and isinstance(value, str):
                self._own_text[key] = self._stated(key, value)
            elif key.endswith("_token") and (value is None or _is_token(value)):
                self._own[key] = None if value is None else self._stated(key, value)
        if config.get(NEWER) or OLDER not in config:
            self._take_extra(config)
        else:
            self._take_list(config, OLDER, place=NEWER)
        if not self._own_text:
            self._take_own(config.get(OWN))

    def take_map(self, content: Mapping[str, Any]) -> None:
        """special_tokens_map.json, which has precedence for a name."""
        for key, value in content.items():
            if key in NAMES:
                self._named[key] = None if value is None else self._special(key, value)
            elif key.endswith("_token") and (value is None or isinstance(value, str | dict)):
                self._own[key] = None if value is None else self._special(key, value)
        new = content.get(NEWER)
        if isinstance(new, list):
            self._extra[NEWER] = _distinct(*self._extra.get(NEWER, ()), *(self._special(NEWER, each) for each in new))
        else:
            self._take_extra(content)

    def take_added(self, content: Mapping[str, Any]) -> None:
        """added_tokens.json, ids by text. A token that is an object in tokenizer_config.json is not special here."""
        objects = {id(token) for token in self._objects}
        stated = (*self._named.values(), *self._extra.get(NEWER, ()))
        special = {token.content for token in stated if token is not None and id(token) not in objects}
        for text, number in content.items():
            if type(number) is not int:
                raise self._refusal(text, "an id", number)
            flags = {"normalized": text not in special, "special": text in special}
            self._by_text[text] = self.numbered[number] = AddedToken(text, flags)

    def take_decoder(self, content: object) -> None:
        """`added_tokens_decoder`: tokens by id."""
        if not isinstance(content, Mapping):
            raise self._refusal("added_tokens_decoder", "an object", content)
        for number, value in content.items():
            if not number.isdecimal() or len(number) > 10 or not isinstance(value, Mapping):
                raise self._refusal("added_tokens_decoder", "tokens as objects, by id", {number: value})
            self.numbered[int(number)] = self._token("added_tokens_decoder", value)

    def by_name(self, padding: str | None, defaults: Mapping[str, str]) -> dict[str, AddedToken]:
        """Tokens by name, in the order of `NAMES`. `padding` is the first default of a missing pad_token."""
        # A token of added_tokens.json can have lost its id to a token of tokenizer.json; it is added with its flags.
        named = {name: token and self._by_text.get(token.content, token) for name, token in self._named.items()}
        if padding is not None:
            named.setdefault("pad_token", self._special("pad_token", padding))
        for name, text in defaults.items():
            named.setdefault(name, self._special(name, text))
        own = {name: token for name, token in self._own.items() if token is not None}
        in_order = {name: named.get(name) for name in NAMES} | own | self._own_text
        return {name: token for name, token in in_order.items() if token is not None}

    def to_add(self, named: Collection[AddedToken], present: Collection[AddedToken]) -> tuple[AddedToken, ...]:
        """Tokens to add: first those with ids, in this order, then other special tokens. If a text occurs twice, the
        last token decides how it is matched."""
        numbered = [token for _, token in sorted(self.numbered.items())]
        texts = {token.content for token in (*present, *numbered)}
        extra = self._extra.get(NEWER, self._extra.get(OLDER, ()))
        new = _distinct(*(token for token in (*named, *extra) if token.content not in texts))
        tokens = [*numbered, *new]
        count = len(tokens) - len(present)
        if count > MAX_ADDED_TOKENS:
            raise FileFormatError(f"{self.file}: expected at most {MAX_ADDED_TOKENS:,} tokens, got {count:,}")
        special = {token.content for token in named}
        return tuple(
            AddedToken(token.content, {**token.flags, "special": True}) if token.content in special else token
            for token in tokens
        )

    def flag(self, config: Mapping[str, Any], key: str) -> bool:
        """True or false; false if the key is missing or null."""
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._refusal(key, "true or false", value)
        return bool(value)

    def _take_extra(self, content: Mapping[str, Any]) -> None:
        self._take_list(content, NEWER, place=NEWER)
        if NEWER not in self._extra:
            self._take_list(content, OLDER, place=OLDER)

    def _take_list(self, content: Mapping[str, Any], key: str, place: str) -> None:
        """Tokens as a list, which may be null, or by names that only this model has."""
        value = content.get(key)
        if isinstance(value, Mapping):
            self._extra.pop(place, None)
            self._take_own(value)
        elif value is not None and not isinstance(value, list):
            raise self._refusal(key, "a list or an object", value)
        elif key in content:
            self._extra[place] = [self._stated(key, each) for each in value or ()]

    def _take_own(self, content: object) -> None:
        if isinstance(content, Mapping):
            self._own_text |= {name: self._stated(name, value) for name, value in content.items()}

    def _stated(self, key: str, value: object) -> AddedToken:
        """A token as the file states it: an object that is marked as a token can be not special."""
        if not _is_token(value):
            return self._special(key, value)
        token = self._token(key, value)
        self._objects.append(token)
        return token

    def _special(self, key: str, value: object) -> AddedToken:
        if isinstance(value, str):
            return AddedToken(value, {"special": True}, is_text=True)
        token = self._token(key, value)
        return AddedToken(token.content, {**token.flags, "special": True})

    def _token(self, key: str, value: object) -> AddedToken:
        content = value.get("content") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(content, str):
            raise self._refusal(key, "a token, as text or as an object with a content", value)
        flags = {name: value[name] for name in FLAGS if value.get(name) is not None}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise self._refusal(key, "true or false for the flags of a token", value)
        return AddedToken(content, flags)

    def _refusal(self, key: str, expected: str, value: object) -> FileFormatError:
        return FileFormatError(f"{self.file}, {key}: expected {expected}, got {reprlib.repr(value)}")


def _is_token(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("__type") == "AddedToken"


def _distinct(*tokens: AddedToken) -> list[AddedToken]:
    found: dict[object, AddedToken] = {}
    for token in tokens:
        found.setdefault(token.meaning, token)
    return list(found.values())
