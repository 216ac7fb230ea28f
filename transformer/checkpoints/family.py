"""A family of models: its name, its mapping of options, and its table of tensor names. All of it is data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError
from .documents import Keys
from .entries import Entry, Head
from .names import Names, Stored, layer_of

STOP, PAD = "eos_token_id", "pad_token_id"
TOKENS = ("bos_token_id", "decoder_start_token_id", STOP, PAD)
"""What generation_config.json says too."""


@dataclass(frozen=True)
class Family:
    """A family of checkpoints and the model of ours that runs them.

    `base` is what names begin with in a model with a head, and not in checkpoints of the bare model. `ignored` are
    tensors, `{}` for the layer, that some checkpoints hold and no model needs, except for those architectures in
    `results` that are about them. `also` are other architectures that are read as this one. `copies` are other names of
    a module in checkpoints: some hold it under each, some under one of them. `head` is a tensor whose presence means
    that the head is not the embedding, whatever config.json says. `renamed` are endings of names in old files, each
    with the one that took its place. `float32` are modules, by the last part of their names in checkpoints, that stay
    in float32 where the others are float16. `tokens` are the stop and pad tokens where nothing names any. Of several
    families with one `model_type` the first that `applies` is taken.
    """

    model_type: str
    architecture: str
    config: type[Any]
    model: type[Any]
    entries: tuple[Entry, ...]
    names: Names
    base: str = ""
    ignored: tuple[str, ...] = ()
    results: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    applies: Callable[[Keys], bool] = lambda _: True

    def read(self, keys: Keys, generation: Keys) -> Any:
        """The configuration that config.json describes, with the tokens that generation_config.json gives.

        Raises ConfigurationError, naming the key and the file.
        """
        stop, pad = (self._tokens(key, keys, generation) for key in (STOP, PAD))
        options: dict[str, Any] = {"stop_tokens": stop, "pad_token": pad[0] if pad else None}
        for entry in self.entries:
            options |= entry.read(generation if entry.keys.get("start_token", "") in generation else keys)
        try:
            return self.config(**options)
        except ConfigurationError as error:
            raise self.refusal(keys, error) from error

    def _tokens(self, key: str, keys: Keys, generation: Keys) -> tuple[int, ...]:
        source = generation if key in generation else keys
        default = keys.missing(key, self.tokens.get(key))
        return source.tokens(key) if key in source or default is None else (default,)

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of config.json for the options of a configuration."""
        document: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for entry in self.entries:
            document |= entry.write(options)
        stop = list(options["stop_tokens"])
        return document | {STOP: stop[0] if len(stop) == 1 else stop or None, PAD: options["pad_token"]}

    def build(self, keys: Keys, config: Any) -> nn.Module:
        """The model, on whatever device is the default. Raises ConfigurationError, naming the file."""
        try:
            model: nn.Module = self.model.from_config(config)
        except ConfigurationError as error:
            raise self.refusal(keys, error) from error
        return model

    def refusal(self, keys: Keys, error: ConfigurationError) -> ConfigurationError:
        """The same complaint, with the key that the option comes from and the file."""
        option = str(error).partition(":")[0]
        key = next((entry.keys[option] for entry in self.entries if option in entry.keys), None)
        return ConfigurationError(f"{keys.file}{'' if key is None else f', {key}'}: {error}")

    def stored_name(self, ours: str) -> tuple[str, Stored]:
        """The name in a checkpoint of one of the model's tensors, and its layout there."""
        found = layer_of(ours)
        module, _, kind = found.pattern.rpartition(".")
        if module not in self.names:
            raise ConfigurationError(f"{ours}: expected a tensor that {self.model_type} has too, got another")
        place = self.names[module]
        stored = Stored(place) if isinstance(place, str) else place
        return f"{stored.module}.{kind}".replace("{}", found.layer), stored

    def stored_names(self, ours: str) -> list[tuple[str, Stored]]:
        """Every name under which a checkpoint may have it, the one that is written first."""
        name, stored = self.stored_name(ours)
        kind = name.rpartition(".")[2]
        return [(name, stored), *((f"{copy}.{kind}", stored) for copy in self.copies.get(stored.module, ()))]

    def dtype(self, ours: str, dtype: torch.dtype) -> torch.dtype:
        """What one of the model's tensors has in a model of this dtype."""
        return torch.float32 if dtype is torch.float16 and self.keeps_float32(ours) else dtype

    def keeps_float32(self, ours: str) -> bool:
        """Whether one of the model's tensors stays in float32 where the others are float16."""
        return bool(self.float32) and self.stored_name(ours)[0].split(".")[-2] in self.float32

    def why_equal(self, name: str) -> str:
        """Why a stored tensor has to be equal to another one, under which the model has it too."""
        if name == f"{self.names.get('head.proj')}.weight":
            return "config.json says that the head is the embedding (tie_word_embeddings)"
        return "this model has one table for sources and targets"

    def expected(self, keys: Keys) -> str:
        """The architecture as which a folder is read: what config.json names, where the family knows it."""
        return next((name for name in keys.names("architectures") if name in self._known), self.architecture)

    def others(self, keys: Keys) -> str:
        """The architectures that config.json names where the family knows none of them; empty where it does."""
        names = keys.names("architectures")
        return "" if any(name in self._known for name in names) else ", ".join(names)

    @property
    def _known(self) -> tuple[str, ...]:
        bare = (entry.bare for entry in self.entries if isinstance(entry, Head))
        return (self.architecture, *self.also, *bare)

    def todays_name(self, name: str) -> str:
        """What a stored tensor is called in the files of today."""
        old = next((old for old in self.renamed if name.endswith(old)), None)
        return name if old is None else name.removesuffix(old) + self.renamed[old]

    def ignores(self, name: str, bare: bool, keys: Keys) -> bool:
        """Whether a stored tensor is one that the model does not need; in a `bare` checkpoint names lack their base."""
        pattern = layer_of(self.base * bare + self.todays_name(name)).pattern
        needed = (self.results.get(architecture, ()) for architecture in keys.names("architectures"))
        return pattern in self.ignored and not any(pattern in names for names in needed)
