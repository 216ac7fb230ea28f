"""Rotary embeddings in config.json: `rope_parameters`, and `rope_theta` and `rope_scaling` of older files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigurationError
from ..positions import DynamicNTKScaling
from .documents import Keys
from .entries import Entry, Options
from .scalings import LENGTH, READERS, Reader, scaled_length, written_scaling
from .windows import LAYER_TYPES

BASE = 10000.0
PART, CONTEXT = "partial_rotary_factor", "context_length"

UNSTATED_LENGTH = 32_768
"""`max_position_embeddings` of a model without a context length, in tokens. Without the key readers fall back to 2,048.
Engines take it as the longest sequence and reserve for one of that length: 4 GiB of keys and values of an 8B model (32
layers, 8 groups of 128, bfloat16), which fits beside its weights on a 24 GiB card."""


@dataclass(frozen=True)
class Rope(Entry):
    """Base and scaling of rotary embeddings, and the length of the model.

    Scalings that depend on a length use the caller's `length`, or else the pretraining length, at which they change
    little or nothing. `default_length` is the default of `max_position_embeddings` for scalings.

    `max_position_embeddings` is always written. Where it is not the model's context length, a key `context_length` has
    that: a number, or null for a model without one.

    `base`: the base where no key says it. `part`: the share of each head that is rotated where no key says it; None:
    whole heads, in all models of the family. `base_key` and `part_key` are the keys beside `rope_parameters` in its
    older files. `kinds`: the words of scalings in the family, each with what reads it.
    """

    default_length: int
    base: float = BASE
    part: float | None = None
    base_key: str = "rope_theta"
    part_key: str = PART
    kinds: ClassVar[Mapping[str, Reader]] = READERS

    def read(self, keys: Keys) -> Options:
        # As in transformers: `rope_scaling` unless it is empty, and keys inside of it before keys of config.json.
        rope = keys.inner("rope_parameters" if keys.is_empty("rope_scaling") else "rope_scaling")
        return self.read_rotation(rope.inner_of_all(LAYER_TYPES), keys) | self.read_length(keys)

    def read_rotation(self, rope: Keys, keys: Keys) -> Options:
        """The options of the rotation in `rope`, an object of the file `keys`."""
        kind = rope.word("rope_type" if "rope_type" in rope else "type", self.kinds, "default")
        base = rope.number("rope_theta") if "rope_theta" in rope else keys.number(self.base_key, self.base)
        found, key = (rope, PART) if PART in rope else (keys, self.part_key)
        rotary_dim = self._rotary_dim(found, key, keys)
        try:
            scaling = kind(rope, keys, keys.missing(LENGTH, self.default_length))
        except ConfigurationError as error:
            text = str(error)
            raise error if text.startswith(str(keys.file)) else ConfigurationError(f"{keys.file}, {text}") from error
        return {"rotary_base": base, "rotary_scaling": scaling, "rotary_dim": rotary_dim}

    def read_length(self, keys: Keys) -> Options:
        """The context length."""
        length = keys.whole(LENGTH) if LENGTH in keys else None
        if CONTEXT in keys.given:
            length = keys.whole(CONTEXT) if CONTEXT in keys else None
        return {"context_length": length}

    def _rotary_dim(self, found: Keys, key: str, keys: Keys) -> int | None:
        # Where transformers does not read it, it takes a text as well.
        part = found.number(key, self.part or 1.0, text=self.part is None)
        if self.part is None:
            if part != 1.0:
                raise found.refusal(key, "1, as only a rotation of the whole head is supported")
            return None
        head_dim = keys.whole("head_dim", keys.whole("hidden_size") // keys.whole("num_attention_heads"))
        rotary_dim = int(head_dim * part) if part <= 1.0 else 0
        if rotary_dim % 2 or rotary_dim < 2:
            raise found.refusal(key, f"a share that gives an even number of the {head_dim} dimensions of a head")
        return rotary_dim

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"rope_parameters": self.write_rotation(options)} | self.write_length(options)

    def write_rotation(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The object with base and scaling."""
        scaling = options["rotary_scaling"]
        rope: dict[str, Any] = {"rope_type": "default"} if scaling is None else written_scaling(scaling)
        rope["rope_theta"] = options["rotary_base"]
        if self.part is not None:
            head_dim = options["head_dim"] or options["d_model"] // options["num_heads"]
            rope[PART] = _share(options["rotary_dim"] or head_dim, head_dim)
        return rope

    def write_length(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """`max_position_embeddings`, and `context_length` where that is not the same."""
        scaling, context = options["rotary_scaling"], options["context_length"]
        length = context or scaled_length(scaling) or UNSTATED_LENGTH
        if isinstance(scaling, DynamicNTKScaling):
            length = scaling.original_length
        document: dict[str, Any] = {LENGTH: length}
        return document if length == context else document | {CONTEXT: context}

    @property
    def keys(self) -> Mapping[str, str]:
        rotary_dim = "head_dim" if self.part is None else self.part_key
        return {"rotary_base": self.base_key, "rotary_dim": rotary_dim, "context_length": LENGTH}


def _share(rotary_dim: int, head_dim: int) -> float:
    """The share of a head that `int(head_dim * share)` gives back."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)
