"""Rotary embeddings of full layers, and of sliding ones with another base: `rope_parameters` by kinds of layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .documents import Keys
from .entries import Entry, Options
from .rope import BASE, Rope

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class RopeOfKinds(Rope):
    """Rotary embeddings of full layers, and the base of sliding ones, which have no scaling.

    `layers`: the entry of the windows. `sliding_base_key`: the key of the base of sliding layers in older files, in
    which `base_key` and `rope_scaling` are those of full layers.
    """

    layers: Entry
    sliding_base_key: str
    sliding_base: float = BASE

    def read(self, keys: Keys) -> Options:
        ropes = keys.inner("rope_parameters")
        for key in ropes.given:
            if key not in (FULL, SLIDING):
                raise ropes.refusal(key, f"no such key, as {FULL} and {SLIDING} have their own")
        full, sliding = ropes.inner(FULL), ropes.inner(SLIDING)
        if not keys.is_empty("rope_scaling"):
            if not ropes.is_empty(FULL):
                raise keys.refusal("rope_scaling", f"no such key beside rope_parameters.{FULL}")
            full = keys.inner("rope_scaling")
        options = self.read_rotation(full, keys) | self.read_length(keys)
        sliding = sliding.with_default("rope_theta", keys.number(self.sliding_base_key, self.sliding_base))
        local = self.read_rotation(sliding, keys)
        if local["rotary_scaling"] is not None:
            raise sliding.refusal("rope_type", "default, as only full layers may have a scaling")
        slides = self.layers.read(keys)["window_size"] is not None
        return options | {"rotary_sliding_base": local["rotary_base"] if slides else None}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        local = options["rotary_sliding_base"]
        sliding = {"rope_type": "default", "rope_theta": options["rotary_base"] if local is None else local}
        ropes = {FULL: self.write_rotation(options), SLIDING: sliding}
        return {"rope_parameters": ropes} | self.write_length(options)
