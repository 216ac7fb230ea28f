"""The vocabulary of config mappings: each entry takes keys of config.json to options of a model, and back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .documents import Keys
from .limits import LARGEST_COUNT, MOST_HEADS, WIDEST_HEAD

Options = dict[str, Any]
"""Options of a configuration, by name."""


class Entry(ABC):
    """One line of a family's mapping."""

    @abstractmethod
    def read(self, keys: Keys) -> Options:
        """The options that these keys stand for. Raises ConfigurationError, naming the key and the file."""

    @abstractmethod
    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The keys that stand for these options: all of a configuration's, by name."""

    @property
    def keys(self) -> Mapping[str, str]:
        """The key that each option is read from, where it is one key."""
        return {}


@dataclass(frozen=True)
class _Same(Entry):
    """A key that holds an option as it is."""

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
    most: int = LARGEST_COUNT

    def read(self, keys: Keys) -> Options:
        return {self.option: keys.whole(self.key, self.default, most=self.most)}


@dataclass(frozen=True)
class WholeOrNone(_Same):
    """A whole number of at least 1, or null; `default` where there is no such key."""

    default: int | None = None
    most: int = LARGEST_COUNT

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
    """A finite number above 0, or null; `default` where there is no such key."""

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
    """One of some words: theirs, each with ours. The first of several for one of ours is what is written."""

    words: Mapping[str, str]
    default: str | None = None

    def read(self, keys: Keys) -> Options:
        return {self.option: keys.word(self.key, self.words, self.default)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        theirs = [word for word, ours in self.words.items() if ours == options[self.option]]
        return {self.key: theirs[0] if theirs else options[self.option]}


@dataclass(frozen=True)
class Token(_Same):
    """The id of a token, or null; `default` where there is no such key."""

    default: int | None = None

    def read(self, keys: Keys) -> Options:
        given = keys.tokens(self.key) if self.key in keys else (keys.missing(self.key, self.default),)
        return {self.option: next(iter(given), None)}


class Fixed(Entry):
    """Options that every model of a family has, and config.json does not speak of."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def read(self, _: Keys) -> Options:
        return dict(self.options)

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Only(Entry):
    """A key that must be missing or hold this value, since models of the other kind are not built here."""

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
    """A second name of a whole number, by which transformers overrides the first: both have to say the same."""

    alias: str
    key: str
    default: int | None = None

    def read(self, keys: Keys) -> Options:
        if self.alias in keys and keys.whole(self.alias) != keys.whole(self.key, self.default):
            raise keys.refusal(self.alias, f"what {self.key} says")
        return {}

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class Causal(Entry):
    """`is_causal`, which transformers applies to every decoder: only true, or no such key, hides what comes later."""

    def read(self, keys: Keys) -> Options:
        if not keys.flag("is_causal", keys.missing("is_causal", True)):
            raise keys.refusal("is_causal", "true or no such key, as no decoder here sees what comes later")
        return {}

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Head(Entry):
    """Whether there is a head, and whether it is the embedding: only the `bare` architecture has none."""

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
"""Keys by which transformers alters any model of any family."""


@dataclass(frozen=True)
class Heads(Entry):
    """Heads, and the key/value heads that they share.

    `head_dim` and `groups` are what a config.json without `head_dim` and `num_key_value_heads` means.
    """

    head_dim: int | None = None
    groups: int | None = None

    def read(self, keys: Keys) -> Options:
        heads = keys.whole("num_attention_heads", most=MOST_HEADS)
        unnamed = keys.missing("num_key_value_heads", self.groups)
        groups = keys.whole("num_key_value_heads", unnamed or heads, most=MOST_HEADS)
        if heads % groups:
            means = "" if "num_key_value_heads" in keys else f" ({groups} where it is not there)"
            raise keys.refusal("num_key_value_heads", f"a divisor of num_attention_heads={heads}{means}")
        width = keys.whole("hidden_size")
        if self.head_dim is None and "head_dim" not in keys and (width % heads or width // heads > WIDEST_HEAD):
            most = f"at most {WIDEST_HEAD} times num_attention_heads={heads}"
            raise keys.refusal("hidden_size", f"a multiple of num_attention_heads={heads}, {most}, or a head_dim")
        head_dim = keys.whole("head_dim", self.head_dim or width // heads, most=WIDEST_HEAD)
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
