"""ModernBERT (arXiv 2412.13663): rotary embeddings with two bases, and local attention between global layers.

The head of the masked language model is ignored, because the encoder does not need it.
"""

from collections.abc import Mapping
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
from ..rope_of_kinds import RopeOfKinds
from ..windows import LAYER_TYPES
from .bert import ACTIVATIONS, BIDIRECTIONAL

_TYPES, _LOCAL = "layer_types", "local_attention"
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


class _Ropes(RopeOfKinds):
    """Rotary embeddings with two bases; older files have no scaling."""

    def read(self, keys: Keys) -> Options:
        if not keys.is_empty("rope_scaling"):
            raise keys.refusal("rope_scaling", "no such key; rope_parameters.full_attention has the scaling")
        return super().read(keys)


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
        _Ropes(
            8192,
            base=160_000.0,
            base_key="global_rope_theta",
            layers=_Layers(),
            sliding_base_key="local_rope_theta",
        ),
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
