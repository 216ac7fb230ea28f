"""Entries of config mappings: each converts keys of config.json to options of a model, and back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .documents import Keys
from .limits import MAX_COUNT, MAX_HEAD_DIM, MAX_HEADS

Options = dict[str, Any]
"""Options of a configuration, by name."""


class Entry(ABC):
    """One entry of a family's mapping."""

    @abstractmethod
    def read(self, keys: Keys) -> Options:
        """The options for the keys of a file. Raises ConfigurationError, with the key and the file."""

    @abstractmethod
    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The keys for all options of a configuration, which are given by name."""

    @property
    def keys(self) -> Mapping[str, str]:
        """The key of each option that has exactly one key."""
        return {}


@dataclass(frozen=True)
class _Same(Entry):
    """A key whose value is the option."""

    option: str
    key: str

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {self.key: options[self.option]}

    @property
    def keys(self) -> Mapping[str, str]:
        return {self.option: self.key}


@dataclass(frozen=True)
class Whole(_Same):
    """A whole number of at least 1."""

    default: int | None = None
    most: int = MAX_COUNT

    def read(self, keys: Keys) -> Options:
        return {self.option: keys.whole(self.key, self.default, most=self.most)}


@dataclass(frozen=True)
class WholeOrNone(_Same):
    """A whole number of at least 1, or null; `default` if the key is missing."""

    default: int | None = None
    most: int = MAX_COUNT

    def read(self, keys: Keys) -> Options:
        return {
            self.option: keys.whole(self.key, most=self.most)
            if self.key in keys
            else keys.missing(self.key, self.default)
        }


@dataclass(frozen=True)
class Number(_Same):
    """A finite number above 0."""

    default: float | None = None

    def read(self, keys: Keys) -> Options:
        return {self.option: keys.number(self.key, self.default)}


@dataclass(frozen=True)
class NumberOrNone(_Same):
    """A finite number above 0, or null; `default` if the key is missing."""

    default: float | None = None

    def read(self, keys: Keys) -> Options:
        return {self.option: keys.number(self.key) if self.key in keys else keys.missing(self.key, self.default)}


@dataclass(frozen=True)
class Flag(_Same):
    """True or false."""

    default: bool = False

    def read(self, keys: Keys) -> Options:
        return {self.option: keys.flag(self.key, self.default)}


@dataclass(frozen=True)
class Word(_Same):
    """One of several words; `words` maps words of config.json to ours. Writing uses the first match."""

    words: Mapping[str, str]
    default: str | None = None

    def read(self, keys: Keys) -> Options:
        return {self.option: keys.word(self.key, self.words, self.default)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        theirs = [word for word, ours in self.words.items() if ours == options[self.option]]
        return {self.key: theirs[0] if theirs else options[self.option]}


@dataclass(frozen=True)
class Token(_Same):
    """The id of a token, or null; `default` if the key is missing."""

    default: int | None = None

    def read(self, keys: Keys) -> Options:
        given = keys.tokens(self.key) if self.key in keys else (keys.missing(self.key, self.default),)
        return {self.option: next(iter(given), None)}


class Fixed(Entry):
    """Options that all models of a family have and that config.json does not contain."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def read(self, _: Keys) -> Options:
        return dict(self.options)

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Only(Entry):
    """A key that must be missing or have this value, because models with other values are not supported."""

    key: str
    value: object

    def read(self, keys: Keys) -> Options:
        if not keys.is_value(self.key, self.value):
            raise keys.refusal(self.key, f"{self.value!r}, as other models of this family are not supported")
        return {}

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {} if self.value is None else {self.key: self.value}


@dataclass(frozen=True)
class Alias(Entry):
    """A second key of a whole number. In transformers it overrides the first key, so both must have the same value."""

    alias: str
    key: str
    default: int | None = None

    def read(self, keys: Keys) -> Options:
        if self.alias in keys and keys.whole(self.alias) != keys.whole(self.key, self.default):
            raise keys.refusal(self.alias, f"the value of {self.key}")
        return {}

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class Causal(Entry):
    """`is_causal`, which transformers applies to all decoders: only true, or a missing key, gives a causal decoder."""

    def read(self, keys: Keys) -> Options:
        if not keys.flag("is_causal", keys.missing("is_causal", True)):
            raise keys.refusal("is_causal", "true or no such key, as all decoders of this library are causal")
        return {}

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Head(Entry):
    """The head: missing in the `bare` architecture, and possibly tied to the embedding."""

    bare: str
    tied: bool = False

    def read(self, keys: Keys) -> Options:
        tied = keys.flag("tie_word_embeddings", self.tied)
        return {"tied_embeddings": tied, "has_head": keys.names("architectures") != [self.bare]}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        document = {"tie_word_embeddings": options["tied_embeddings"]}
        return document if options["has_head"] else document | {"architectures": [self.bare]}

    @property
    def keys(self) -> Mapping[str, str]:
        return {"tied_embeddings": "tie_word_embeddings"}


UNALTERED: tuple[Entry, ...] = (Only("quantization_config", None), Only("per_layer_config", None))
"""Keys with which transformers changes a model of any family."""


@dataclass(frozen=True)
class Heads(Entry):
    """Query heads and key/value heads.

    `head_dim` and `groups` are the defaults of a missing `head_dim` and `num_key_value_heads`.
    """

    head_dim: int | None = None
    groups: int | None = None

    def read(self, keys: Keys) -> Options:
        heads = keys.whole("num_attention_heads", most=MAX_HEADS)
        unnamed = keys.missing("num_key_value_heads", self.groups)
        groups = keys.whole("num_key_value_heads", unnamed or heads, most=MAX_HEADS)
        if heads % groups:
            default = "" if "num_key_value_heads" in keys else f" ({groups} if it is missing)"
            raise keys.refusal("num_key_value_heads", f"a divisor of num_attention_heads={heads}{default}")
        width = keys.whole("hidden_size")
        if self.head_dim is None and "head_dim" not in keys and (width % heads or width // heads > MAX_HEAD_DIM):
            most = f"at most {MAX_HEAD_DIM} times num_attention_heads={heads}"
            raise keys.refusal("hidden_size", f"a multiple of num_attention_heads={heads}, {most}, or a head_dim")
        head_dim = keys.whole("head_dim", self.head_dim or width // heads, most=MAX_HEAD_DIM)
        kind = "mha" if groups == heads else "mqa" if groups == 1 else "gqa"
        return {
            "num_heads": heads,
            "attention": kind,
            "num_groups": groups if kind == "gqa" else None,
            "head_dim": head_dim,
        }

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        heads = options["num_heads"]
        groups = {"mha": heads, "mqa": 1}.get(options["attention"], options["num_groups"])
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": options["head_dim"] or options["d_model"] // heads,
        }
