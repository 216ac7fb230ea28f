"""T5 and UMT5 of transformers at tiny sizes with random weights, and ours with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration, UMT5ForConditionalGeneration
from transformers import UMT5Config as TheirUMT5Config

from tests.peers.models import fill
from transformer.models import (
    EncoderDecoderConfig,
    EncoderDecoderTransformer,
    UMT5Config,
    UMT5Model,
    t5_config,
    t5_v1_1_config,
)

VOCABULARY, WIDTH, HEADS, HIDDEN, PAD = 31, 24, 4, 40, 2
SHAPE = {"relative_buckets": 8, "relative_max_distance": 10, "norm_eps": 1e-3}
THEIR_SHAPE = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_ff": HIDDEN,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "layer_norm_epsilon": 1e-3,
}
BRANCHES = {"SelfAttention": "attention", "EncDecAttention": "cross_attention", "DenseReluDense": "feed_forward"}
PROJECTIONS = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "out_proj",
    "wi": "up_proj",
    "wi_0": "gate_proj",
    "wi_1": "up_proj",
    "wo": "down_proj",
}


class Pair(NamedTuple):
    ours: EncoderDecoderTransformer | UMT5Model
    theirs: nn.Module

    def expected(self, source: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Their logits [B, L, V]."""
        with torch.no_grad():
            return self.theirs(input_ids=source, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits

    def written(self, source: Tensor, tokens: int, mask: Tensor | None = None, **options: object) -> Tensor:
        """The tokens that they generate, without the start token and without caches."""
        options = {"use_cache": False, "do_sample": False, "max_new_tokens": tokens, "pad_token_id": PAD, **options}
        return self.theirs.generate(source, attention_mask=mask, decoder_start_token_id=0, **options)[:, 1:]


def pair(
    family: str, *, encoders: int = 2, decoders: int = 3, head_dim: int = 7, stops: bool = False, seed: int = 5
) -> Pair:
    """Both in float64, where their model allows it, by equal weights; without `stops` no token ends a row."""
    layers = {"num_layers": encoders, "num_decoder_layers": decoders, "head_dim": head_dim}
    shape = {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_heads": HEADS, "d_ff": HIDDEN, **layers, **SHAPE}
    tied = family == "t5"
    config = {"t5": t5_config, "t5 1.1": t5_v1_1_config, "umt5": UMT5Config}[family](**shape)
    activation = {"feed_forward_proj": "relu" if tied else "gated-gelu", "tie_word_embeddings": tied}
    sizes = {**THEIR_SHAPE, "num_layers": encoders, "num_decoder_layers": decoders, "d_kv": head_dim, **activation}
    if family == "umt5":
        ours, theirs = UMT5Model(config), UMT5ForConditionalGeneration(TheirUMT5Config(**sizes))
    else:
        ours, theirs = EncoderDecoderTransformer.from_config(config), T5ForConditionalGeneration(T5Config(**sizes))
    if not tied:
        # They tie the two whatever their configuration says, and part them again when different ones are loaded.
        theirs.lm_head.weight = nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    # Which of these says whether the states are scaled changed within version 5.
    theirs.config.tie_word_embeddings = theirs.config.scale_decoder_outputs = tied
    fill(theirs, seed=seed)
    model = ours.transformer if isinstance(ours, UMT5Model) else ours
    load(model, theirs)
    theirs.generation_config.eos_token_id = 1 if stops else None
    if not stops:
        model.config = replace(model.config, stop_tokens=())
    return Pair(ours.eval(), theirs.eval())


def load(ours: EncoderDecoderTransformer, theirs: nn.Module) -> None:
    """Their weights for ours, each by its name; none of ours is left out."""
    filled = set()
    for name, tensor in theirs.state_dict().items():
        for place in places(name, ours.config):
            parameter = ours.get_parameter(place)
            parameter.data.copy_(tensor)
            filled.add(id(parameter))
    assert filled == {id(parameter) for parameter in ours.parameters()}


def places(name: str, config: EncoderDecoderConfig) -> list[str]:
    """Where ours has one of their tensors."""
    if name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        return ["target_embedding.tokens.weight"]
    if name == "lm_head.weight":
        return ["head.proj.weight"]
    side, *rest = name.split(".")
    if rest[0] == "final_layer_norm":
        return [f"{side}.norm.weight"]
    _, index, _, layer, module, *last = rest
    block = f"{side}.blocks.{index}"
    if module == "layer_norm":
        branches = ["attention", "feed_forward"] if side == "encoder" else [*BRANCHES.values()]
        return [f"{block}.{branches[int(layer)]}_residual.norm_before.weight"]
    branch = BRANCHES[module]
    if last[0] == "relative_attention_bias":
        return [f"{block}.{branch}.position.embedding.weight"]
    return [f"{block}.{branch}.{PROJECTIONS[last[0]]}.weight"]


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Tokens that end and pad nothing."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
