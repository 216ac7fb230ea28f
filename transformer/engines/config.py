"""Configuration of the engines' modules: the keys of config.json, and the composition that they describe."""

import json
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..checkpoints.documents import Keys
from ..checkpoints.families.modular import read_composition, write_composition
from ..checkpoints.folder import CONFIG
from ..errors import ConfigurationError
from ..models.composition import Composition

DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": True,
    "sliding_window": None,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Keys that transformers reads from every configuration."""


class ModularConfig(PreTrainedConfig):
    """A decoder-only composition, by the keys that `save_model` writes: standard ones, and our own for the rest.

    transformers and vLLM read the standard keys; the modules are built from `composition()`, which reads all of them.
    """

    model_type = "modular_attention"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "cache"]
    base_model_tp_plan: ClassVar = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(self, *, use_cache: bool = True, **keys: Any) -> None:
        super().__init__(**(DEFAULTS | keys))
        # The base class drops it, as an option of generation.
        self.use_cache = use_cache

    @classmethod
    def of(cls, composition: Composition) -> "ModularConfig":
        """The configuration of a composition. Raises ConfigurationError for one that engines cannot run."""
        return cls(**write_composition(composition))

    def composition(self) -> Composition:
        """The composition that the keys describe now. Raises ConfigurationError for missing or invalid keys."""
        document = json.loads(self.to_json_string(use_diff=False))
        return read_composition(Keys(document, Path(self.name_or_path or "", CONFIG)))

    @property
    def layer_windows(self) -> list[int | None]:
        """The window of each layer; None: full attention. `sliding_window` is the widest."""
        return [layer.options.window_size for layer in self.composition().expanded().layers]

    @property
    def has_softcap(self) -> bool:
        """Whether the attention scores of a layer have a soft cap."""
        return any(layer.options.softcap is not None for layer in self.composition().expanded().layers)


class NativeConfig(PreTrainedConfig):
    """What the Auto classes find for folders of models that only `load_model` reads: a refusal."""

    model_type = "modular_attention_native"

    def __init__(self, **_keys: Any) -> None:
        raise ConfigurationError(
            'model_type: expected "modular_attention", which transformers runs, got "modular_attention_native" (ALiBi, '
            "relative bias, attention sinks, an encoder, an encoder-decoder, or no head); load the folder with "
            "transformer.checkpoints.load_model"
        )
