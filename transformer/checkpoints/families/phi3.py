"""Phi-3 (arXiv 2404.14219) and Phi-4 (arXiv 2412.08905, 2503.01743): Llama with fused projections, heads that may be
rotated in part, and LongRoPE."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ...positions import LongRoPEScaling
from ..documents import Keys
from ..entries import Head, Heads, Number, Options, Token, WholeOrNone
from ..family import PAD, STOP, Family
from ..names import Names, Stored
from ..rope import Rope
from ..scalings import ORIGINAL, Reader, longrope, plain
from .llama import ENTRIES, IGNORED, NAMES


class _Rope(Rope):
    """LongRoPE under the three names that it had, with a pretraining length of config.json itself."""

    kinds: ClassVar[Mapping[str, Reader]] = {"default": plain, "longrope": longrope, "su": longrope, "yarn": longrope}

    def read(self, keys: Keys) -> Options:
        return super().read(keys.with_default(ORIGINAL, 4096))

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        scaling = options["rotary_scaling"]
        original = {ORIGINAL: scaling.original_length} if isinstance(scaling, LongRoPEScaling) else {}
        return super().write(options) | original


_LAYER, _QKV, _GATE_UP = "decoder.blocks.{}.", "model.layers.{}.self_attn.qkv_proj", "model.layers.{}.mlp.gate_up_proj"


def _layout(config: DecoderOnlyConfig) -> Names:
    parts = (config.num_heads // config.kv_heads, 1, 1)
    return {
        f"{_LAYER}attention.{name}": Stored(_QKV, part=part, parts=parts)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj"))
    }


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *ENTRIES,
        # Another default than Llama's.
        Number("norm_eps", "rms_norm_eps", 1e-5),
        Heads(),
        Head("Phi3Model"),
        _Rope(4096, part=1.0),
        Token("start_token", "bos_token_id", 1),
        WholeOrNone("window_size", "sliding_window"),
    ),
    names={
        **NAMES,
        f"{_LAYER}feed_forward.gate_proj": Stored(_GATE_UP, part=0, parts=(1, 1)),
        f"{_LAYER}feed_forward.up_proj": Stored(_GATE_UP, part=1, parts=(1, 1)),
    },
    layout=_layout,
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 32000, PAD: 32000},
)
