"""Granite 3 (IBM; scales of maximal update parametrisation, arXiv 2203.03466): Llama with four multipliers."""

from collections.abc import Mapping
from typing import Any

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..documents import Keys
from ..entries import Entry, Flag, Head, Heads, Number, Options, Token
from ..family import STOP, Family
from ..rope import Rope
from .llama import ENTRIES, IGNORED, NAMES

_SCORES, _LOGITS = "attention_multiplier", "logits_scaling"


class _ScoreScale(Entry):
    """Factor of scores, which is always written: a missing key means 1."""

    def read(self, keys: Keys) -> Options:
        return {"scale": keys.number(_SCORES, 1.0)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        head_dim = options["head_dim"] or options["d_model"] // options["num_heads"]
        return {_SCORES: head_dim**-0.5 if options["scale"] is None else options["scale"]}

    @property
    def keys(self) -> Mapping[str, str]:
        return {"scale": _SCORES}


class _LogitDivisor(Entry):
    """Number by which logits are divided."""

    def read(self, keys: Keys) -> Options:
        return {"logit_scale": 1.0 / keys.number(_LOGITS, 1.0)}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {_LOGITS: 1.0 / options["logit_scale"]}

    @property
    def keys(self) -> Mapping[str, str]:
        return {"logit_scale": _LOGITS}


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *ENTRIES,
        Heads(),
        Head("GraniteModel"),
        Rope(2048),
        Token("start_token", "bos_token_id", 1),
        Flag("attention_bias", "attention_bias"),
        Flag("feed_forward_bias", "mlp_bias"),
        Number("embedding_scale", "embedding_multiplier", 1.0),
        Number("residual_scale", "residual_multiplier", 1.0),
        _ScoreScale(),
        _LogitDivisor(),
    ),
    names=NAMES,
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 2},
)
