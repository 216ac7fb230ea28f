"""Qwen2 (arXiv 2407.10671), with biases of queries, keys and values, and Qwen3 (arXiv 2505.09388), with QK norms."""

from ...models import FULL, SLIDING, DecoderOnlyConfig, DecoderOnlyTransformer
from ..documents import Keys
from ..entries import Entry, Fixed, Flag, Head, Heads, Token
from ..family import Family
from ..rope import Rope
from ..windows import LayerTypes
from .llama import ENTRIES, IGNORED, NAMES


def _sliding_last_layers(keys: Keys, layers: int) -> list[str]:
    full = min(keys.whole("max_window_layers", 28, least=0), layers)
    return [FULL] * full + [SLIDING] * (layers - full)


_SHARED: tuple[Entry, ...] = (
    *ENTRIES,
    Rope(32768),
    Token("start_token", "bos_token_id"),
    LayerTypes(_sliding_last_layers, window=4096, switch="use_sliding_window"),
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(*_SHARED, Heads(groups=32), Head("Qwen2Model"), Fixed(attention_bias=True, out_bias=False)),
    names=NAMES,
    base="model.",
    ignored=IGNORED,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *_SHARED,
        Heads(head_dim=128, groups=32),
        Head("Qwen3Model"),
        Flag("attention_bias", "attention_bias"),
        Fixed(qk_norm=True),
    ),
    names={
        **NAMES,
        "decoder.blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "decoder.blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    },
    base="model.",
    ignored=IGNORED,
)
