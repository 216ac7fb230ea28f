"""Gemma 3 (arXiv 2503.19786), its text models: norms of queries and keys, and two bases of rotary embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...models import FULL, SLIDING, DecoderOnlyConfig, DecoderOnlyTransformer
from ..documents import Keys
from ..entries import Fixed, Head, Heads, NumberOrNone, Only, Options, Word
from ..family import PAD, STOP, Family
from ..rope import Rope
from ..windows import LayerTypes
from .gemma import ACTIVATIONS, NAMES_OF_FOUR_NORMS, SHARED, QueryScale
from .llama import IGNORED

_FULL, _SLIDING, _LOCAL_BASE = "full_attention", "sliding_attention", "rope_local_base_freq"
_WINDOW, _PATTERN = "sliding_window", "sliding_window_pattern"


def _full_every_sixth(keys: Keys, layers: int) -> list[str]:
    pattern = keys.whole(_PATTERN, 6)
    return [SLIDING if layer % pattern else FULL for layer in range(1, layers + 1)]


LAYERS = LayerTypes(_full_every_sixth, window=4096)


@dataclass(frozen=True)
class _Ropes(Rope):
    """Rotary embeddings of full layers, and the base of sliding ones, which have no scaling.

    Older files have `rope_theta` and `rope_scaling` for the first, and `rope_local_base_freq` for the second.
    """

    def read(self, keys: Keys) -> Options:
        ropes = keys.inner("rope_parameters")
        for key in ropes.given:
            if key not in (_FULL, _SLIDING):
                raise ropes.refusal(key, f"no such key, as {_FULL} and {_SLIDING} have their own")
        if _WINDOW in keys.given and _WINDOW not in keys and "layer_types" not in keys:
            raise keys.refusal(_WINDOW, "a number, as each kind of layer has its own rotary embeddings")
        full, sliding = ropes.inner(_FULL), ropes.inner(_SLIDING)
        if not keys.is_empty("rope_scaling"):
            if not ropes.is_empty(_FULL):
                raise keys.refusal("rope_scaling", f"no such key beside rope_parameters.{_FULL}")
            full = keys.inner("rope_scaling")
        options = self.read_rotation(full, keys) | self.read_length(keys)
        sliding = sliding.with_default("rope_theta", keys.number(_LOCAL_BASE, 10000.0))
        local = self.read_rotation(sliding, keys)
        if local["rotary_scaling"] is not None:
            raise sliding.refusal("rope_type", "default, as only full layers may have a scaling")
        slides = LAYERS.read(keys)["window_size"] is not None
        return options | {"rotary_sliding_base": local["rotary_base"] if slides else None}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        local = options["rotary_sliding_base"]
        sliding = {"rope_type": "default", "rope_theta": options["rotary_base"] if local is None else local}
        ropes = {_FULL: self.write_rotation(options), _SLIDING: sliding}
        return {"rope_parameters": ropes} | self.write_length(options)


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *SHARED,
        _Ropes(131072, base=1e6),
        Heads(head_dim=256, groups=4),
        Head("Gemma3TextModel", tied=True),
        LAYERS,
        QueryScale(),
        # transformers does not read it.
        Only("attn_logit_softcapping", None),
        NumberOrNone("logit_softcap", "final_logit_softcapping"),
        Word("activation", "hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        Fixed(norm_placement="both", qk_norm=True),
    ),
    names={
        **NAMES_OF_FOUR_NORMS,
        "decoder.blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "decoder.blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    },
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 1, PAD: 0},
)
