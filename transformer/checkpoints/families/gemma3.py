"""Gemma 3 (arXiv 2503.19786), its text models: norms of queries and keys, and two bases of rotary embeddings."""

from ...models import FULL, SLIDING, DecoderOnlyConfig, DecoderOnlyTransformer
from ..documents import Keys
from ..entries import Fixed, Head, Heads, NumberOrNone, Only, Options, Word
from ..family import PAD, STOP, Family
from ..rope_of_kinds import RopeOfKinds
from ..windows import LayerTypes
from .gemma import ACTIVATIONS, NAMES_OF_FOUR_NORMS, SHARED, QueryScale
from .llama import IGNORED

_WINDOW, _PATTERN = "sliding_window", "sliding_window_pattern"


def _full_every_sixth(keys: Keys, layers: int) -> list[str]:
    pattern = keys.whole(_PATTERN, 6)
    return [SLIDING if layer % pattern else FULL for layer in range(1, layers + 1)]


LAYERS = LayerTypes(_full_every_sixth, window=4096)


class _Ropes(RopeOfKinds):
    """Rotary embeddings with two bases; a null as the window would leave open which one a layer has."""

    def read(self, keys: Keys) -> Options:
        if _WINDOW in keys.given and _WINDOW not in keys and "layer_types" not in keys:
            raise keys.refusal(_WINDOW, "a number, as each kind of layer has its own rotary embeddings")
        return super().read(keys)


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *SHARED,
        _Ropes(131072, base=1e6, layers=LAYERS, sliding_base_key="rope_local_base_freq"),
        Heads(head_dim=256, groups=4),
        Head("Gemma3TextModel", tied=True),
        LAYERS,
        QueryScale(),
        # transformers does not read it.
        Only("attn_logit_softcapping", None),
        NumberOrNone("logit_softcap", "final_logit_softcapping"),
        Word("activation", "hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        Fixed(norm_placement="both", qk_norm=True),
    ),
    names={
        **NAMES_OF_FOUR_NORMS,
        "decoder.blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "decoder.blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    },
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 1, PAD: 0},
)
