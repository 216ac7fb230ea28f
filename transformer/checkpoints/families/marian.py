"""Marian (arXiv 1804.00344): translation models, with one vocabulary of both languages or one of each."""

from collections.abc import Mapping
from typing import Any

from ...models import EncoderDecoderConfig, EncoderDecoderTransformer
from ..documents import Keys
from ..entries import Entry, Fixed, Only, Options, Whole
from ..family import PAD, STOP, Family
from .bart import names, shape
from .t5 import Start

SHARED = "share_encoder_decoder_embeddings"

_NAMES = names("after")


class _Vocabularies(Entry):
    """The vocabularies of sources and of targets; by default they are of one size."""

    def read(self, keys: Keys) -> Options:
        size = keys.whole("vocab_size")
        return {"src_vocab_size": size, "tgt_vocab_size": keys.whole("decoder_vocab_size", size)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"vocab_size": options["src_vocab_size"], "decoder_vocab_size": options["tgt_vocab_size"]}

    @property
    def keys(self) -> Mapping[str, str]:
        return {"shared_embeddings": "decoder_vocab_size"}


def _family(*, shared: bool) -> Family:
    """Models with one vocabulary of both languages, or with one of each."""
    return Family(
        model_type="marian",
        architecture="MarianMTModel",
        config=EncoderDecoderConfig,
        model=EncoderDecoderTransformer,
        entries=(
            _Vocabularies(),
            *shape("MarianModel", "after"),
            Whole("context_length", "max_position_embeddings", 1024),
            Start(58100),
            Only(SHARED, shared),
            Only("normalize_embedding", False),
            Only("static_position_embeddings", True),
            Fixed(position="sinusoidal", sinusoidal_interleaved=False, shared_embeddings=shared),
        ),
        names=_NAMES if shared else {**_NAMES, "target_embedding.tokens": "model.decoder.embed_tokens"},
        base="model.",
        other_architectures=("MarianModel",),
        aliases={"model.shared": ("model.decoder.embed_tokens",)},
        tokens={STOP: 0, PAD: 58100},
        # Sinusoids, which old files contain as tensors.
        ignored=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
        applies=lambda keys: keys.flag(SHARED, True) is shared,
    )


MARIAN = _family(shared=True)
MARIAN_SEPARATE = _family(shared=False)
