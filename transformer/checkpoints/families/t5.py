"""T5 1.0 and 1.1 (arXiv 1910.10683), mT5 (arXiv 2010.11934), UMT5 (arXiv 2304.09151), and their encoders."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...models import (
    EncoderConfig,
    EncoderDecoderConfig,
    EncoderDecoderTransformer,
    EncoderTransformer,
    UMT5Model,
)
from ..documents import Keys
from ..entries import UNALTERED, Alias, Entry, Fixed, Flag, Number, Only, Options, Whole, WholeOrNone, Word
from ..family import PAD, STOP, Family
from ..limits import MAX_BUCKETS, MAX_CHECKPOINT_LAYERS, MAX_HEADS
from ..names import Names

PLAIN = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}
GATED = {"gated-gelu": "gelu_tanh", "gated-gelu_new": "gelu_tanh", "gated-silu": "silu", "gated-relu": "relu"}
IS_GATED = {**dict.fromkeys(PLAIN, False), **dict.fromkeys(GATED, True)}
FEED_FORWARD, TIED, SCALED = "feed_forward_proj", "tie_word_embeddings", "scale_decoder_outputs"


class Vocabulary(Entry):
    """One vocabulary for sources and targets."""

    def read(self, keys: Keys) -> Options:
        size = keys.whole("vocab_size")
        return {"src_vocab_size": size, "tgt_vocab_size": size}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"vocab_size": options["tgt_vocab_size"]}


@dataclass(frozen=True)
class Start(Entry):
    """First token of targets; `default` if the key is missing."""

    default: int | None

    def read(self, keys: Keys) -> Options:
        return {"start_token": keys.whole("decoder_start_token_id", self.default, least=0)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"decoder_start_token_id": options["start_token"]}

    @property
    def keys(self) -> Mapping[str, str]:
        return {"start_token": "decoder_start_token_id"}


class _WithHead(Entry):
    """An architecture other than a bare encoder-decoder, whose tied table would pass for a head that it has not."""

    def read(self, keys: Keys) -> Options:
        if keys.names("architectures") in (["T5Model"], ["MT5Model"], ["UMT5Model"]):
            raise keys.refusal(
                "architectures", "a model with a head (ForConditionalGeneration), or an encoder alone (EncoderModel)"
            )
        return {}

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class _Scaled(Entry):
    """Scale of the input of the head; default: scaled if the head is tied to the embedding."""

    def read(self, keys: Keys) -> Options:
        # Null means false, as in transformers.
        scaled = keys.flag(SCALED, keys.missing(SCALED, keys.flag(TIED, True)) or False)
        return {"logit_scale": keys.whole("d_model") ** -0.5 if scaled else 1.0}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {SCALED: options["logit_scale"] != 1.0}


def _names(prefix: str, *, gated: bool, bias_of_layer: str) -> Names:
    """The names of a model with the prefix `prefix`. `bias_of_layer`: the layer that has the relative bias."""
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


@dataclass(frozen=True)
class _Restated(Entry):
    """`dense_act_fn` and `is_gated_act`, which repeat `feed_forward_proj`. Transformers uses these two keys."""

    default: str

    def read(self, keys: Keys) -> Options:
        gated = keys.word(FEED_FORWARD, IS_GATED, self.default)
        if keys.flag("is_gated_act", gated) != gated:
            raise keys.refusal("is_gated_act", f"{gated}, as in {FEED_FORWARD}")
        activation = keys.word(FEED_FORWARD, PLAIN | GATED, self.default)
        if "dense_act_fn" in keys and keys.word("dense_act_fn", PLAIN) != activation:
            raise keys.refusal("dense_act_fn", f"{activation}, as in {FEED_FORWARD}")
        return {}

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def _shape(*, gated: bool, per_layer: bool) -> tuple[Entry, ...]:
    """Entries that an encoder without a decoder has too."""
    default = "gated-gelu" if gated else "relu"
    return (
        Whole("d_model", "d_model"),
        Whole("num_heads", "num_heads", most=MAX_HEADS),
        Whole("head_dim", "d_kv", 64),
        Whole("d_ff", "d_ff"),
        Whole("num_layers", "num_layers", most=MAX_CHECKPOINT_LAYERS),
        Whole("relative_buckets", "relative_attention_num_buckets", 32, most=MAX_BUCKETS),
        Whole("relative_max_distance", "relative_attention_max_distance", 128),
        Number("norm_eps", "layer_norm_epsilon", 1e-6),
        Word("activation", FEED_FORWARD, GATED if gated else PLAIN, default),
        _Restated(default),
        Alias("hidden_size", "d_model"),
        Alias("num_attention_heads", "num_heads"),
        Alias("num_hidden_layers", "num_layers"),
        Alias("head_dim", "d_kv", 64),
        # True would make the encoder causal too, false would make the decoder bidirectional.
        Only("is_causal", None),
        *UNALTERED,
        Fixed(
            position="relative",
            relative_per_layer=per_layer,
            scale=1.0,
            feed_forward="gated" if gated else "plain",
        ),
    )


def _entries(*, gated: bool, per_layer: bool) -> tuple[Entry, ...]:
    return (
        Vocabulary(),
        *_shape(gated=gated, per_layer=per_layer),
        WholeOrNone("num_decoder_layers", "num_decoder_layers", most=MAX_CHECKPOINT_LAYERS),
        Flag("tied_embeddings", TIED, True),
        Start(0),
        _WithHead(),
        Only("is_encoder_decoder", True),
        Fixed(shared_embeddings=True),
    )


_family = partial(
    Family,
    config=EncoderDecoderConfig,
    head="lm_head.weight",
    tokens={STOP: 1, PAD: 0},
    aliases={"shared": ("decoder.embed_tokens",)},
    # Its results exceed the largest float16 (66246 was measured); the residual stream after it is float32.
    float32=("wo",),
    # A bias that the first checkpoints contain and no model uses.
    ignored=("decoder.block.{}.layer.1.EncDecAttention.relative_attention_bias.weight",),
)
_t5 = partial(_family, model_type="t5", architecture="T5ForConditionalGeneration", model=EncoderDecoderTransformer)


def _is_gated(keys: Keys) -> bool:
    return keys.word(FEED_FORWARD, IS_GATED, "relu")


T5 = _t5(
    entries=(*_entries(gated=False, per_layer=False), _Scaled()),
    names=_names("", gated=False, bias_of_layer="0"),
)
T5_GATED = _t5(
    entries=(*_entries(gated=True, per_layer=False), _Scaled()),
    names=_names("", gated=True, bias_of_layer="0"),
    applies=_is_gated,
)
MT5 = _family(
    model_type="mt5",
    architecture="MT5ForConditionalGeneration",
    model=EncoderDecoderTransformer,
    entries=(*_entries(gated=True, per_layer=False), Fixed(logit_scale=1.0)),
    names=_names("", gated=True, bias_of_layer="0"),
)
UMT5 = _family(
    model_type="umt5",
    architecture="UMT5ForConditionalGeneration",
    model=UMT5Model,
    entries=(*_entries(gated=True, per_layer=True), _Scaled()),
    names=_names("transformer.", gated=True, bias_of_layer="{}"),
)


def _encoder(family: Family, *, gated: bool, per_layer: bool = False) -> Family:
    """The family of encoders without a decoder, which are recognised by their architecture."""
    architecture = family.architecture.replace("ForConditionalGeneration", "EncoderModel")
    names = _names("", gated=gated, bias_of_layer="{}" if per_layer else "0")
    return replace(
        family,
        architecture=architecture,
        config=EncoderConfig,
        model=EncoderTransformer,
        entries=(Whole("vocab_size", "vocab_size"), *_shape(gated=gated, per_layer=per_layer)),
        names={ours: name for ours, name in names.items() if ours.startswith("encoder.")}
        | {"embedding.tokens": "shared"},
        aliases={"shared": ("encoder.embed_tokens",)},
        head="",
        applies=lambda keys: keys.names("architectures") == [architecture] and family.applies(keys),
    )


T5_ENCODER = _encoder(T5, gated=False)
T5_GATED_ENCODER = _encoder(T5_GATED, gated=True)
MT5_ENCODER = _encoder(MT5, gated=True)
UMT5_ENCODER = _encoder(UMT5, gated=True, per_layer=True)
