"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in all layers."""

from ...models import DecoderOnlyConfig, DecoderOnlyTransformer
from ..entries import Fixed, Head, Heads, Number, Token, Whole, WholeOrNone
from ..family import STOP, Family
from ..limits import MAX_EXPERTS
from ..names import EXPERT, Names, Stored
from ..rope import Rope
from .llama import ENTRIES, IGNORED, NAMES

_OURS, _THEIRS = "decoder.blocks.{}.feed_forward.", "model.layers.{}.block_sparse_moe."

NAMES_AROUND_EXPERTS: Names = {ours: theirs for ours, theirs in NAMES.items() if not ours.startswith(_OURS)}
"""Names of Llama without those of feed-forward networks."""

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    config=DecoderOnlyConfig,
    model=DecoderOnlyTransformer,
    entries=(
        *ENTRIES,
        Heads(groups=8),
        Head("MixtralModel"),
        Rope(131072, base=1e6),
        Token("start_token", "bos_token_id", 1),
        Number("norm_eps", "rms_norm_eps", 1e-5),
        WholeOrNone("window_size", "sliding_window"),
        Whole("num_experts", "num_local_experts", 8, most=MAX_EXPERTS),
        Whole("experts_per_token", "num_experts_per_tok", 2, most=MAX_EXPERTS),
        Fixed(feed_forward="mixture", normalize_routing_weights=True),
    ),
    names={
        **NAMES_AROUND_EXPERTS,
        f"{_OURS}router": f"{_THEIRS}gate",
        f"{_OURS}gate_proj": Stored(f"{_THEIRS}experts.{EXPERT}.w1"),
        f"{_OURS}up_proj": Stored(f"{_THEIRS}experts.{EXPERT}.w3"),
        f"{_OURS}down_proj": Stored(f"{_THEIRS}experts.{EXPERT}.w2"),
    },
    base="model.",
    ignored=IGNORED,
    tokens={STOP: 2},
)
