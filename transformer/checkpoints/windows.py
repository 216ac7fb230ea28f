"""Sliding and full attention layers: `layer_types` and `sliding_window` in config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..blocks import layer_kinds
from ..blocks.layers import shortest_pattern
from ..models import FULL, SLIDING
from .documents import Keys
from .entries import Entry, Options
from .limits import MAX_CHECKPOINT_LAYERS

LAYER_TYPES = {"sliding_attention": SLIDING, "full_attention": FULL}
"""Words of config.json, each with the word of this library."""
_WINDOW, _TYPES = "sliding_window", "layer_types"


@dataclass(frozen=True)
class LayerTypes(Entry):
    """The window, and the kind of each layer.

    `default_kinds` gives the kinds for a config.json without `layer_types`, from its keys and the number of layers.
    `switch` is the key that turns windows on, if the family has one. `window` is the default of `sliding_window`.
    """

    default_kinds: Callable[[Keys, int], list[str]]
    window: int | None
    switch: str | None = None

    def read(self, keys: Keys) -> Options:
        window = keys.whole(_WINDOW) if _WINDOW in keys else keys.missing(_WINDOW, self.window)
        if self.switch is not None and not keys.flag(self.switch, False):
            window = None
        layers = keys.whole("num_hidden_layers", most=MAX_CHECKPOINT_LAYERS)
        if _TYPES in keys:
            kinds = keys.words(_TYPES, LAYER_TYPES, layers)
        else:
            kinds = self.default_kinds(keys, layers) if window is not None else [FULL] * layers
        if SLIDING not in kinds:
            return {"window_size": None, "layer_pattern": None}
        if window is None:
            raise keys.refusal(_TYPES, f"no {SLIDING} layers, as there is no {_WINDOW}")
        return {"window_size": window, "layer_pattern": shortest_pattern(kinds)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        window, number = options["window_size"], options["num_layers"]
        kinds = layer_kinds(options["layer_pattern"] or (FULL if window is None else SLIDING), number)
        theirs = {ours: word for word, ours in LAYER_TYPES.items()}
        document = {_WINDOW: window, _TYPES: [theirs[kind] for kind in kinds]}
        return document if self.switch is None else document | {self.switch: window is not None}

    @property
    def keys(self) -> Mapping[str, str]:
        return {"window_size": _WINDOW, "layer_pattern": _TYPES}
