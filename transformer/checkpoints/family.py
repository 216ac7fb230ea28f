"""Families of checkpoints, as data: name, mapping of options, and table of tensor names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError
from .documents import Keys
from .entries import Entry, Head
from .names import Names, Stored, layer_of

STOP, PAD = "eos_token_id", "pad_token_id"
TOKENS = ("bos_token_id", "decoder_start_token_id", STOP, PAD)
"""Keys that generation_config.json has too."""


@dataclass(frozen=True)
class Family:
    """A family of checkpoints, and the model class that runs them.

    Args:
        model_type, architecture: the family's names in config.json.
        config, model: classes of the configuration and the model.
        entries: conversions between keys of config.json and options.
        names: module names of the model, each with its name in a checkpoint.
        layout: the names and layouts that depend on the configuration, which `laid_out` adds to the others.
        base: prefix of the names in a model with a head; checkpoints of the bare model lack it.
        ignored: tensors (`{}` for the layer) that some checkpoints contain and the model does not need.
        needed_by: architectures that do need ignored tensors, each with these tensors.
        other_architectures: further architectures that are loaded as this one.
        aliases: further names of a module in checkpoints, which contain one or several of its names.
        head: a tensor whose presence means that the head is not tied to the embedding, regardless of config.json.
        old_suffixes: suffixes of names in old files, each with the current suffix.
        float32: modules, by the last part of their name in checkpoints, that stay float32 in a float16 model.
        tokens: default stop and pad tokens.
        applies: test of a config.json; the first family with this `model_type` that passes it is used.
        composes: whether it describes a `Composition`, of layers that may differ, instead of a configuration.
        own: whether it is a format of this library: dropout is saved too, and tensors that are loaded without a `dtype`
            keep their own; else all get the widest.
    """

    model_type: str
    architecture: str
    config: type[Any]
    model: type[Any]
    entries: tuple[Entry, ...]
    names: Names
    layout: Callable[[Any], Names] | None = None
    base: str = ""
    ignored: tuple[str, ...] = ()
    needed_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    other_architectures: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head: str = ""
    old_suffixes: Mapping[str, str] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    applies: Callable[[Keys], bool] = lambda _: True
    composes: bool = False
    own: bool = False

    def read(self, keys: Keys, generation: Keys) -> Any:
        """The configuration in config.json, with the tokens of generation_config.json.

        Raises ConfigurationError, with the key and the file.
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

    def describe(self, described: Any) -> dict[str, Any]:
        """The keys of config.json for what `read` gives."""
        return self.write(described.to_dict())

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of config.json for the options of a configuration."""
        document: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for entry in self.entries:
            document |= entry.write(options)
        stop = list(options["stop_tokens"])
        return document | {STOP: stop[0] if len(stop) == 1 else stop or None, PAD: options["pad_token"]}

    def generation(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of generation_config.json, from those of config.json."""
        return {key: document[key] for key in TOKENS if key in document}

    def build(self, keys: Keys, config: Any) -> nn.Module:
        """The model, on the default device. Raises ConfigurationError, with the file."""
        try:
            model: nn.Module = self.model.from_config(config)
        except ConfigurationError as error:
            raise self.refusal(keys, error) from error
        return model

    def refusal(self, keys: Keys, error: ConfigurationError) -> ConfigurationError:
        """The same error, with the key of the option and the file."""
        option = str(error).partition(":")[0]
        key = next((entry.keys[option] for entry in self.entries if option in entry.keys), None)
        return ConfigurationError(f"{keys.file}{'' if key is None else f', {key}'}: {error}")

    def laid_out(self, config: Any) -> "Family":
        """The family as it stores the tensors of a model of that configuration."""
        return self if self.layout is None else replace(self, names={**self.names, **self.layout(config)})

    def stored_name(self, ours: str) -> tuple[str, Stored]:
        """The name of a tensor of the model in a checkpoint, and its layout there."""
        found = layer_of(ours)
        module, _, kind = found.pattern.rpartition(".")
        entry, ending = self.names.get(found.pattern), ""
        if entry is None:
            entry, ending = self.names.get(module), f".{kind}"
        if entry is None:
            raise ConfigurationError(f"{ours}: expected a tensor of the family {self.model_type}, got another tensor")
        stored = Stored(entry) if isinstance(entry, str) else entry
        return f"{stored.module}{ending}".replace("{}", found.layer), stored

    def stored_names(self, ours: str) -> list[tuple[str, Stored]]:
        """All names of a tensor in checkpoints; the first is used for saving."""
        name, stored = self.stored_name(ours)
        kind = name.rpartition(".")[2]
        return [(name, stored), *((f"{alias}.{kind}", stored) for alias in self.aliases.get(stored.module, ()))]

    def dtype(self, ours: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a tensor of the model, in a model of this dtype."""
        return torch.float32 if dtype is torch.float16 and self.keeps_float32(ours) else dtype

    def keeps_float32(self, ours: str) -> bool:
        """True if a tensor stays float32 in a float16 model."""
        return bool(self.float32) and self.stored_name(ours)[0].split(".")[-2] in self.float32

    def why_equal(self, name: str) -> str:
        """Reason why two stored tensors must be equal, for an error message."""
        if self.own:
            return "the options in config.json make the two one tensor"
        if name == f"{self.names.get('head.proj')}.weight":
            return "the head is tied to the embedding in config.json (tie_word_embeddings)"
        return "this model shares one embedding between sources and targets"

    def expected(self, keys: Keys) -> str:
        """The architecture that a folder is loaded as: the one in config.json if the family knows it."""
        return next((name for name in keys.names("architectures") if name in self._known), self.architecture)

    def unknown_architectures(self, keys: Keys) -> str:
        """The architectures in config.json if the family knows none of them; else empty."""
        names = keys.names("architectures")
        return "" if any(name in self._known for name in names) else ", ".join(names)

    @property
    def _known(self) -> tuple[str, ...]:
        bare = (entry.bare for entry in self.entries if isinstance(entry, Head))
        return (self.architecture, *self.other_architectures, *bare)

    def current_name(self, name: str) -> str:
        """The name of a stored tensor in current files."""
        old = next((old for old in self.old_suffixes if name.endswith(old)), None)
        return name if old is None else name.removesuffix(old) + self.old_suffixes[old]

    def ignores(self, name: str, bare: bool, keys: Keys) -> bool:
        """True if the model does not need a stored tensor; in a `bare` checkpoint names lack the prefix `base`."""
        pattern = layer_of(self.base * bare + self.current_name(name)).pattern
        needed = (self.needed_by.get(architecture, ()) for architecture in keys.names("architectures"))
        return pattern in self.ignored and not any(pattern in names for names in needed)
