"""Gemma (arXiv 2403.08295) and Gemma 2 (arXiv 2408.00118)."""

from collections.abc import Mapping
from typing import Any

from ...models import FULL, SLIDING, DecoderOnlyConfig, DecoderOnlyTransformer
from ..documents import Keys
from ..entries import (
    UNALTERED,
    Causal,
    Entry,
    Fixed,
    Flag,
    Head,
    Heads,
    Number,
    NumberOrNone,
    Only,
    Options,
    Token,
    Word,
)
from ..family import PAD, STOP, Family
from ..rope import Rope
from ..windows import LayerTypes
from .llama import IGNORED, NAMES, SIZES

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu", "relu": "relu"}
# The first release of Gemma has "gelu" in its config.json, but was trained with the approximation by tanh.
FIRST_ACTIVATIONS = {**ACTIVATIONS, "gelu": "gelu_tanh"}


class _EmbeddingScale(Entry):
    """Scale of embeddings: the square root of their width."""

    def read(self, keys: Keys) -> Options:
        return {"embedding_scale": keys.whole("hidden_size") ** 0.5}

    def write(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class QueryScale(Entry):
    """Scale of scores: one over the square root of `query_pre_attn_scalar`."""

    def read(self, keys: Keys) -> Options:
        return {"scale": keys.whole("query_pre_attn_scalar", 256) ** -0.5}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        head_dim = options["head_dim"] or options["d_model"] // options["num_heads"]
        return {"query_pre_attn_scalar": head_dim if options["scale"] is None else round(options["scale"] ** -2)}


def _sliding_every_other(_: Keys, layers: int) -> list[str]:
    return [SLIDING if layer % 2 == 0 else FULL for layer in range(layers)]


SHARED: tuple[Entry, ...] = (
    *SIZES,
    Token("start_token", "bos_token_id", 2),
    _EmbeddingScale(),
    Number("norm_eps", "rms_norm_eps", 1e-6),
    Flag("attention_bias", "attention_bias"),
    Only("use_bidirectional_attention", False),
    Causal(),
    *UNALTERED,
    Fixed(norm="rms", norm_unit_offset=True, feed_forward="gated", position="rotary"),
)
"""Entries of all Gemmas."""

GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *SHARED,
        Rope(8192),
        Heads(head_dim=256, groups=16),
        Head("GemmaModel", tied=True),
        Word("activation", "hidden_act", FIRST_ACTIVATIONS, "gelu_pytorch_tanh"),
    ),
    names=NAMES,
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 1, PAD: 0},
)

_LAYER, _THEIRS = "decoder.blocks.{}.", "model.layers.{}."

NAMES_OF_FOUR_NORMS = {
    **NAMES,
    f"{_LAYER}attention_residual.norm_branch": f"{_THEIRS}post_attention_layernorm",
    f"{_LAYER}feed_forward_residual.norm_before": f"{_THEIRS}pre_feedforward_layernorm",
    f"{_LAYER}feed_forward_residual.norm_branch": f"{_THEIRS}post_feedforward_layernorm",
}
"""Names of Gemmas with norms on both sides of a branch."""

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *SHARED,
        Rope(8192),
        Heads(head_dim=256, groups=4),
        Head("Gemma2Model", tied=True),
        LayerTypes(_sliding_every_other, window=4096),
        QueryScale(),
        NumberOrNone("softcap", "attn_logit_softcapping", 50.0),
        NumberOrNone("logit_softcap", "final_logit_softcapping", 30.0),
        Word("activation", "hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        Fixed(norm_placement="both"),
    ),
    names=NAMES_OF_FOUR_NORMS,
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 1, PAD: 0},
)
