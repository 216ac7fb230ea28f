"""SmolLM3 (HuggingFaceTB, 2025): Llama with layers without positions (arXiv 2501.18795), and windows if switched on."""

from collections.abc import Mapping
from typing import Any

from ...blocks import layer_kinds
from ...blocks.layers import shortest_pattern
from ...models import FULL, SLIDING, DecoderOnlyConfig, DecoderOnlyTransformer
from ..documents import Keys
from ..entries import Entry, Flag, Head, Heads, Options, Token
from ..family import PAD, STOP, Family
from ..limits import MAX_CHECKPOINT_LAYERS
from ..rope import Rope
from ..windows import LayerTypes
from .llama import ENTRIES, IGNORED, NAMES

_ROTATED, _INTERVAL = "no_rope_layers", "no_rope_layer_interval"


def _rotated(keys: Keys, layers: int) -> list[bool]:
    """True for each layer that has rotary embeddings, as the key says against its name."""
    if _ROTATED not in keys:
        interval = keys.whole(_INTERVAL, 4)
        return [layer % interval != 0 for layer in range(1, layers + 1)]
    given = keys.wholes(_ROTATED)
    if len(given) < layers:
        raise keys.refusal(_ROTATED, f"a list of at least {layers} numbers, one for each layer")
    return [number != 0 for number in given[:layers]]


class _RotatedLayers(Entry):
    """Layers with and without rotary embeddings."""

    def read(self, keys: Keys) -> Options:
        rotated = _rotated(keys, keys.whole("num_hidden_layers", most=MAX_CHECKPOINT_LAYERS))
        words = ["rotary" if each else "none" for each in rotated]
        return {"position_pattern": None if all(rotated) else shortest_pattern(words)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        pattern = options["position_pattern"] or options["position"]
        return {_ROTATED: [int(word != "none") for word in layer_kinds(pattern, options["num_layers"])]}

    @property
    def keys(self) -> Mapping[str, str]:
        return {"position_pattern": _ROTATED}


def _sliding_without_positions(keys: Keys, layers: int) -> list[str]:
    return [FULL if rotated else SLIDING for rotated in _rotated(keys, layers)]


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *ENTRIES,
        Heads(groups=4),
        Head("SmolLM3Model", tied=True),
        Rope(32768, base=2e6),
        _RotatedLayers(),
        LayerTypes(_sliding_without_positions, window=None, switch="use_sliding_window"),
        Token("start_token", "bos_token_id", 128000),
        Flag("attention_bias", "attention_bias"),
        Flag("feed_forward_bias", "mlp_bias"),
    ),
    names=NAMES,
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 128001, PAD: 128004},
)
