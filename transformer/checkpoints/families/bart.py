"""BART (arXiv 1910.13461), and mBART (arXiv 2001.08210), which has its norms before the branches.

Checkpoints of the bare model (`BartModel`), such as the pretrained ones, have no bias of the logits; their head is the
table of the embedding, as it was in pretraining.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...models import EncoderDecoderConfig, EncoderDecoderTransformer
from ..documents import Keys
from ..entries import UNALTERED, Alias, Entry, Fixed, Only, Options, Whole, Word
from ..family import PAD, STOP, Family
from ..limits import MAX_CHECKPOINT_LAYERS, MAX_COUNT, MAX_HEADS
from ..names import Names, Stored
from .gpt2 import ACTIVATIONS
from .t5 import Start, Vocabulary

SCALED = "scale_embedding"


@dataclass(frozen=True)
class _BothSides(Entry):
    """A whole number that the encoder and the decoder have in common, with a key for each."""

    option: str
    key: str
    most: int = MAX_COUNT

    def read(self, keys: Keys) -> Options:
        ours, theirs = self._keys
        size = keys.whole(ours, most=self.most)
        if keys.whole(theirs) != size:
            raise keys.refusal(theirs, f"the value of {ours}, as other models are not supported")
        return {self.option: size}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(self._keys, options[self.option])

    @property
    def keys(self) -> Mapping[str, str]:
        return {self.option: self._keys[0]}

    @property
    def _keys(self) -> tuple[str, str]:
        return f"encoder_{self.key}", f"decoder_{self.key}"


class _DecoderLayers(Whole):
    """Layers of the decoder; they are those of the encoder where no option says it."""

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {self.key: options[self.option] or options["num_layers"]}


class _Scale(Entry):
    """Factor of the embedding: the root of the width, or none."""

    def read(self, keys: Keys) -> Options:
        return {"embedding_scale": keys.whole("d_model") ** 0.5 if keys.flag(SCALED, False) else 1.0}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {SCALED: options["embedding_scale"] != 1.0}


@dataclass(frozen=True)
class _HeadBias(Entry):
    """The bias of the logits, which the `bare` architecture has not."""

    bare: str

    def read(self, keys: Keys) -> Options:
        return {"head_bias": keys.names("architectures") != [self.bare]}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {} if options["head_bias"] else {"architectures": [self.bare]}


def shape(bare: str, norm_placement: str) -> tuple[Entry, ...]:
    """Entries of all these families, with the architecture without a head, and the place of the norms."""
    before = norm_placement == "before"
    return (
        Whole("d_model", "d_model"),
        _BothSides("num_heads", "attention_heads", MAX_HEADS),
        _BothSides("d_ff", "ffn_dim"),
        Whole("num_layers", "encoder_layers", most=MAX_CHECKPOINT_LAYERS),
        _DecoderLayers("num_decoder_layers", "decoder_layers", most=MAX_CHECKPOINT_LAYERS),
        Word("activation", "activation_function", ACTIVATIONS, "gelu"),
        _Scale(),
        _HeadBias(bare),
        Alias("hidden_size", "d_model"),
        Alias("num_attention_heads", "encoder_attention_heads"),
        Alias("num_hidden_layers", "encoder_layers"),
        # Keys of the first releases, for models that have other families now.
        Only("normalize_before", before),
        Only("add_final_layer_norm", before),
        Only("tie_word_embeddings", True),
        Only("is_encoder_decoder", True),
        Only("is_decoder", False),
        Only("is_causal", None),
        *UNALTERED,
        Fixed(
            attention_bias=True,
            norm="layer",
            norm_eps=1e-5,
            norm_placement=norm_placement,
            feed_forward="plain",
            feed_forward_bias=True,
            tied_embeddings=True,
        ),
    )


def names(placement: str) -> Names:
    """The names of all these families, with the place of the norms, "before" or "after"."""
    found: dict[str, str | Stored] = {
        "head.proj": "lm_head",
        "head.proj.bias": Stored("final_logits_bias", as_row=True),
        "target_embedding.tokens": "model.shared",
        "source_embedding.tokens": "model.encoder.embed_tokens",
    }
    attentions = {"attention": "self_attn", "cross_attention": "encoder_attn"}
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.blocks.{{}}", f"model.{side}.layers.{{}}"
        for branch, module in attentions.items():
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found[f"{ours}.{branch}.{projection}"] = f"{theirs}.{module}.{projection}"
            found[f"{ours}.{branch}_residual.norm_{placement}"] = f"{theirs}.{module}_layer_norm"
        found[f"{ours}.feed_forward.up_proj"] = f"{theirs}.fc1"
        found[f"{ours}.feed_forward.down_proj"] = f"{theirs}.fc2"
        found[f"{ours}.feed_forward_residual.norm_{placement}"] = f"{theirs}.final_layer_norm"
        found[f"{side}.norm"] = f"model.{side}.layer_norm"
    return found


def _input_names() -> Names:
    found = {}
    for ours, side in (("source", "encoder"), ("target", "decoder")):
        found[f"{ours}_positions.positions.embedding"] = f"model.{side}.embed_positions"
        found[f"{ours}_positions.norm"] = f"model.{side}.layernorm_embedding"
    return found


def _family(model_type: str, prefix: str, norm_placement: str, start: int | None) -> Family:
    """`start`: the start token where no file says it."""
    return Family(
        model_type=model_type,
        architecture=f"{prefix}ForConditionalGeneration",
        config=EncoderDecoderConfig,
        model=EncoderDecoderTransformer,
        entries=(
            Vocabulary(),
            *shape(f"{prefix}Model", norm_placement),
            Whole("max_length", "max_position_embeddings", 1024),
            Start(start),
            Only("normalize_embedding", True),
            Only("static_position_embeddings", False),
            Fixed(position="learned", position_offset=2, embedding_norm=True, shared_embeddings=True),
        ),
        names={**names(norm_placement), **_input_names()},
        base="model.",
        other_architectures=(f"{prefix}Model",),
        aliases={"model.shared": ("model.decoder.embed_tokens",)},
        tokens={STOP: 2, PAD: 1},
        ignored=("model.encoder.version", "model.decoder.version"),
    )


BART = _family("bart", "Bart", "after", 2)
# Its start token is the language of the target, or the stop token with a forced first token.
MBART = _family("mbart", "MBart", "before", None)
