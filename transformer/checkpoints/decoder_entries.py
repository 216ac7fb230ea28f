"""Entries of several families of decoders: one key for two options or words, two keys for one option."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .documents import Keys
from .entries import Entry, Options
from .limits import MAX_COUNT, MAX_HEADS


@dataclass(frozen=True)
class Switch(Entry):
    """A flag that chooses one of two words."""

    option: str
    key: str
    on: str
    off: str
    default: bool

    def read(self, keys: Keys) -> Options:
        return {self.option: self.on if keys.flag(self.key, self.default) else self.off}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {self.key: options[self.option] == self.on}

    @property
    def keys(self) -> Mapping[str, str]:
        return {self.option: self.key}


@dataclass(frozen=True)
class Biases(Entry):
    """A flag for the biases of all projections, of attention and of feed-forward networks."""

    key: str
    default: bool

    def read(self, keys: Keys) -> Options:
        return dict.fromkeys(("attention_bias", "feed_forward_bias"), keys.flag(self.key, self.default))

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {self.key: options["attention_bias"]}


@dataclass(frozen=True)
class TwoNames(Entry):
    """A whole number at one of two keys, which have one value where both are given."""

    option: str
    key: str
    other: str
    most: int = MAX_COUNT

    def read(self, keys: Keys) -> Options:
        name = self.key if self.key in keys else self.other
        number = keys.whole(name, most=self.most)
        if self.other in keys and keys.whole(self.other) != number:
            raise keys.refusal(self.other, f"the value of {self.key}")
        return {self.option: number}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {self.key: options[self.option]}

    @property
    def keys(self) -> Mapping[str, str]:
        return {self.option: self.key}


class EvenHeads(Entry):
    """Heads that split the width evenly: `head_dim`, which transformers reads here in one place alone, is no other."""

    def read(self, keys: Keys) -> Options:
        width, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads", most=MAX_HEADS)
        if width % heads:
            raise keys.refusal("hidden_size", f"a multiple of num_attention_heads={heads}")
        if keys.whole("head_dim", width // heads) != width // heads:
            raise keys.refusal("head_dim", f"{width // heads}, hidden_size by num_attention_heads, or no such key")
        return {}

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}
