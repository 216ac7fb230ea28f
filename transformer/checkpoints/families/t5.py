"""T5 1.0 and 1.1 (arXiv 1910.10683), mT5 (arXiv 2010.11934) and UMT5 (arXiv 2304.09151)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...models import EncoderDecoderConfig, EncoderDecoderTransformer, UMT5Model
from ..documents import Keys
from ..entries import Entry, Fixed, Flag, Number, Only, Options, Whole, WholeOrNone, Word
from ..family import Family
from ..limits import MOST_BUCKETS, MOST_HEADS, MOST_LAYERS
from ..names import Names

PLAIN = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}
GATED = {"gated-gelu": "gelu_tanh", "gated-gelu_new": "gelu_tanh", "gated-silu": "silu", "gated-relu": "relu"}
FEED_FORWARD, TIED, SCALED = "feed_forward_proj", "tie_word_embeddings", "scale_decoder_outputs"


class _Vocabulary(Entry):
    """One vocabulary for sources and targets."""

    def read(self, keys: Keys) -> Options:
        size = keys.whole("vocab_size")
        return {"src_vocab_size": size, "tgt_vocab_size": size}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"vocab_size": options["tgt_vocab_size"]}


class _Start(Entry):
    """What targets begin with."""

    def read(self, keys: Keys) -> Options:
        return {"start_token": keys.whole("decoder_start_token_id", 0, least=0)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"decoder_start_token_id": options["start_token"]}


@dataclass(frozen=True)
class _Scaled(Entry):
    """Whether what the head reads is scaled; where nothing says so, it is where the head is the embedding."""

    def read(self, keys: Keys) -> Options:
        scaled = keys.flag(SCALED, keys.flag(TIED, True))
        return {"logit_scale": keys.whole("d_model") ** -0.5 if scaled else 1.0}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {SCALED: options["logit_scale"] != 1.0}


def _names(prefix: str, *, gated: bool, bias_of_layer: str) -> Names:
    """The table of a model whose own names begin with `prefix`; `bias_of_layer`: of which one the biases are."""
    names = {"target_embedding.tokens": "shared", "head.proj": "lm_head"}
    names["source_embedding.tokens"] = "encoder.embed_tokens"
    inner = {"gate_proj": "wi_0", "up_proj": "wi_1"} if gated else {"up_proj": "wi"}
    for side, branches in (
        ("encoder", ("attention", "feed_forward")),
        ("decoder", ("attention", "cross_attention", "feed_forward")),
    ):
        names[f"{side}.norm"] = f"{side}.final_layer_norm"
        bias = f"{side}.block.{bias_of_layer}.layer.0.SelfAttention.relative_attention_bias"
        names[f"{side}.blocks.{{}}.attention.position.embedding"] = bias
        for layer, branch in enumerate(branches):
            ours, theirs = f"{side}.blocks.{{}}.{branch}", f"{side}.block.{{}}.layer.{layer}"
            names[f"{ours}_residual.norm_before"] = f"{theirs}.layer_norm"
            if branch == "feed_forward":
                for own, name in {**inner, "down_proj": "wo"}.items():
                    names[f"{ours}.{own}"] = f"{theirs}.DenseReluDense.{name}"
            else:
                module = "SelfAttention" if branch == "attention" else "EncDecAttention"
                for own, name in {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}.items():
                    names[f"{ours}.{own}"] = f"{theirs}.{module}.{name}"
    return {prefix + ours: theirs for ours, theirs in names.items()}


def _entries(*, gated: bool, own_head: bool, per_layer: bool) -> tuple[Entry, ...]:
    return (
        _Vocabulary(),
        Whole("d_model", "d_model"),
        Whole("num_heads", "num_heads", most=MOST_HEADS),
        Whole("head_dim", "d_kv", 64),
        Whole("d_ff", "d_ff"),
        Whole("num_layers", "num_layers", most=MOST_LAYERS),
        WholeOrNone("num_decoder_layers", "num_decoder_layers", most=MOST_LAYERS),
        Whole("relative_buckets", "relative_attention_num_buckets", 32, most=MOST_BUCKETS),
        Whole("relative_max_distance", "relative_attention_max_distance", 128),
        Number("norm_eps", "layer_norm_epsilon", 1e-6),
        Word("activation", FEED_FORWARD, GATED if gated else PLAIN, "gated-gelu" if gated else "relu"),
        Flag("tied_embeddings", TIED, not own_head),
        _Start(),
        Only("is_encoder_decoder", True),
        Only("quantization_config", None),
        Fixed(
            position="relative",
            relative_per_layer=per_layer,
            scale=1.0,
            shared_embeddings=True,
            feed_forward="gated" if gated else "plain",
        ),
    )


_family = partial(
    Family,
    config=EncoderDecoderConfig,
    head="lm_head.weight",
    copies={"shared": ("decoder.embed_tokens",)},
    # Its sums pass the largest float16 (66246 were measured); the residual stream is float32 from there on.
    float32=("wo",),
    # A bias that the first checkpoints hold and no model ever read.
    ignored=("decoder.block.{}.layer.1.EncDecAttention.relative_attention_bias.weight",),
)
_t5 = partial(_family, model_type="t5", architecture="T5ForConditionalGeneration", model=EncoderDecoderTransformer)

T5 = _t5(
    entries=(*_entries(gated=False, own_head=False, per_layer=False), _Scaled()),
    names=_names("", gated=False, bias_of_layer="0"),
)
T5_GATED = _t5(
    entries=(*_entries(gated=True, own_head=False, per_layer=False), _Scaled()),
    names=_names("", gated=True, bias_of_layer="0"),
    applies=lambda keys: keys.word(FEED_FORWARD, {**dict.fromkeys(PLAIN, False), **dict.fromkeys(GATED, True)}, "relu"),
)
MT5 = _family(
    model_type="mt5",
    architecture="MT5ForConditionalGeneration",
    model=EncoderDecoderTransformer,
    entries=(*_entries(gated=True, own_head=True, per_layer=False), Fixed(logit_scale=1.0)),
    names=_names("", gated=True, bias_of_layer="0"),
)
UMT5 = _family(
    model_type="umt5",
    architecture="UMT5ForConditionalGeneration",
    model=UMT5Model,
    entries=(*_entries(gated=True, own_head=False, per_layer=True), _Scaled()),
    names=_names("transformer.", gated=True, bias_of_layer="{}"),
)
