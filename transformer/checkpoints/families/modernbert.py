"""ModernBERT (arXiv 2412.13663): rotary embeddings with two bases, and local attention between global layers.

The head of the masked language model is ignored, because the encoder does not need it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...blocks import layer_kinds
from ...blocks.layers import shortest_pattern
from ...models import FULL, SLIDING, EncoderConfig, EncoderTransformer
from ..classifiers import classifier
from ..documents import Keys
from ..entries import Entry, Fixed, Flag, Number, Only, Options, Whole, Word
from ..family import PAD, STOP, Family
from ..limits import MAX_CHECKPOINT_LAYERS, MAX_HEADS
from ..names import Stored
from ..rope import Rope
from ..windows import LAYER_TYPES
from .bert import ACTIVATIONS, BIDIRECTIONAL

_FULL, _SLIDING, _TYPES, _LOCAL = "full_attention", "sliding_attention", "layer_types", "local_attention"
_OURS, _LAYER = "encoder.blocks.{}", "model.layers.{}"


class _Layers(Entry):
    """Global and local layers. A token in a local layer sees `local_attention // 2` tokens on each side, and itself."""

    def read(self, keys: Keys) -> Options:
        layers = keys.whole("num_hidden_layers", most=MAX_CHECKPOINT_LAYERS)
        every = keys.whole("global_attn_every_n_layers", 3)
        kinds = [SLIDING if layer % every else FULL for layer in range(layers)]
        if _TYPES in keys:
            kinds = keys.words(_TYPES, LAYER_TYPES, layers)
        if SLIDING not in kinds:
            return {"window_size": None, "layer_pattern": None}
        return {"window_size": keys.whole(_LOCAL, 128) // 2 + 1, "layer_pattern": shortest_pattern(kinds)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        window, number = options["window_size"], options["num_layers"]
        theirs = {ours: word for word, ours in LAYER_TYPES.items()}
        kinds = layer_kinds(options["layer_pattern"] or (FULL if window is None else SLIDING), number)
        document: dict[str, Any] = {_TYPES: [theirs[kind] for kind in kinds]}
        return document if window is None else document | {_LOCAL: max(2 * (window - 1), 1)}

    @property
    def keys(self) -> Mapping[str, str]:
        return {"window_size": _LOCAL, "layer_pattern": _TYPES}


@dataclass(frozen=True)
class _Ropes(Rope):
    """Rotary embeddings of global layers, and the base of local ones, which have no scaling.

    Older files have `global_rope_theta` for the first, and `local_rope_theta` for the second.
    """

    def read(self, keys: Keys) -> Options:
        ropes = keys.inner("rope_parameters")
        for key in ropes.given:
            if key not in (_FULL, _SLIDING):
                raise ropes.refusal(key, f"no such key, as {_FULL} and {_SLIDING} have their own")
        if not keys.is_empty("rope_scaling"):
            raise keys.refusal("rope_scaling", f"no such key; rope_parameters.{_FULL} has the scaling")
        full = ropes.inner(_FULL).with_default("rope_theta", keys.number("global_rope_theta", 160_000.0))
        sliding = ropes.inner(_SLIDING).with_default("rope_theta", keys.number("local_rope_theta", 10_000.0))
        local = self.read_rotation(sliding, keys)
        if local["rotary_scaling"] is not None:
            raise sliding.refusal("rope_type", "default, as only global layers may have a scaling")
        slides = _Layers().read(keys)["window_size"] is not None
        base = {"rotary_sliding_base": local["rotary_base"] if slides else None}
        return self.read_rotation(full, keys) | self.read_length(keys) | base

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        local = options["rotary_sliding_base"]
        sliding = {"rope_type": "default", "rope_theta": options["rotary_base"] if local is None else local}
        ropes = {_FULL: self.write_rotation(options), _SLIDING: sliding}
        return {"rope_parameters": ropes} | self.write_length(options)


MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBertModel",
    config=EncoderConfig,
    model=EncoderTransformer,
    entries=(
        Whole("vocab_size", "vocab_size", 50_368),
        Whole("d_model", "hidden_size", 768),
        Whole("d_ff", "intermediate_size", 1152),
        Whole("num_layers", "num_hidden_layers", 22, most=MAX_CHECKPOINT_LAYERS),
        Whole("num_heads", "num_attention_heads", 12, most=MAX_HEADS),
        _Layers(),
        _Ropes(8192),
        Number("norm_eps", "norm_eps", 1e-5),
        Flag("norm_bias", "norm_bias"),
        Flag("attention_bias", "attention_bias"),
        Flag("feed_forward_bias", "mlp_bias"),
        Word("activation", "hidden_activation", ACTIVATIONS, "gelu"),
        # Transformers would take it instead of local_attention.
        Only("sliding_window", None),
        *BIDIRECTIONAL,
        Fixed(
            position="rotary",
            norm="layer",
            norm_placement="before",
            feed_forward="gated",
            embedding_norm=True,
            first_norm=False,
            num_token_types=0,
        ),
    ),
    names={
        "embedding.tokens": "model.embeddings.tok_embeddings",
        "positions.norm": "model.embeddings.norm",
        f"{_OURS}.attention_residual.norm_before": f"{_LAYER}.attn_norm",
        f"{_OURS}.attention.q_proj": Stored(f"{_LAYER}.attn.Wqkv", part=0, parts=(1, 1, 1)),
        f"{_OURS}.attention.k_proj": Stored(f"{_LAYER}.attn.Wqkv", part=1, parts=(1, 1, 1)),
        f"{_OURS}.attention.v_proj": Stored(f"{_LAYER}.attn.Wqkv", part=2, parts=(1, 1, 1)),
        f"{_OURS}.attention.out_proj": f"{_LAYER}.attn.Wo",
        f"{_OURS}.feed_forward_residual.norm_before": f"{_LAYER}.mlp_norm",
        f"{_OURS}.feed_forward.gate_proj": Stored(f"{_LAYER}.mlp.Wi", part=0, parts=(1, 1)),
        f"{_OURS}.feed_forward.up_proj": Stored(f"{_LAYER}.mlp.Wi", part=1, parts=(1, 1)),
        f"{_OURS}.feed_forward.down_proj": f"{_LAYER}.mlp.Wo",
        "encoder.norm": "model.final_norm",
    },
    base="model.",
    tokens={STOP: 50_282, PAD: 50_283},
    other_architectures=("ModernBertForMaskedLM",),
    ignored=(
        "head.dense.weight",
        "head.dense.bias",
        "head.norm.weight",
        "head.norm.bias",
        "decoder.weight",
        "decoder.bias",
    ),
)

_HEAD = {"head.dense": "head.dense", "head.norm": "head.norm", "head.proj": "classifier"}
_OF_HEAD: tuple[Entry, ...] = (
    Word("head_activation", "classifier_activation", ACTIVATIONS, "gelu"),
    Flag("dense_bias", "classifier_bias"),
    Fixed(head_norm=True),
)
MODERNBERT_ROWS = classifier(
    MODERNBERT,
    "ModernBertForSequenceClassification",
    _HEAD,
    Word("pooling", "classifier_pooling", {"cls": "cls", "mean": "mean"}, "cls"),
    *_OF_HEAD,
)
MODERNBERT_TOKENS = classifier(MODERNBERT, "ModernBertForTokenClassification", _HEAD, Fixed(pooling=None), *_OF_HEAD)
