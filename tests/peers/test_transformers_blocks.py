"""Weights of transformers' decoder-only models in our blocks: the same hidden states, cached and uncached."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Gemma2Config, LlamaConfig, MistralConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2Model
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel

from tests.peers.models import copy_weights, fill, no_float32
from tests.setups import padding, tokens
from transformer import GroupQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.positions import RotaryEmbedding

EMBED_DIM, HIDDEN_DIM, NUM_HEADS, NUM_GROUPS, LENGTH, WINDOW = 24, 40, 4, 2, 11, 4
SIZES = {
    "hidden_size": EMBED_DIM,
    "intermediate_size": HIDDEN_DIM,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_GROUPS,
    "vocab_size": 8,
    "rms_norm_eps": 1e-3,
}
SPLITS = [[1] * LENGTH, [5, 1, 1, 3, 1], [2, 9]]
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
# Their name of the argument that takes a cache, which changed within version 5.
CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"

LLAMA = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "attention_residual.norm_before": "input_layernorm",
    "feed_forward.gate_proj": "mlp.gate_proj",
    "feed_forward.up_proj": "mlp.up_proj",
    "feed_forward.down_proj": "mlp.down_proj",
    "feed_forward_residual.norm_before": "post_attention_layernorm",
}
GEMMA2 = {
    **LLAMA,
    "attention_residual.norm_branch": "post_attention_layernorm",
    "feed_forward_residual.norm_before": "pre_feedforward_layernorm",
    "feed_forward_residual.norm_branch": "post_feedforward_layernorm",
}


def gated_block(window_size: int | None, activation: str, norm: Callable, placement: str, **options) -> DecoderBlock:
    attention = GroupQueryAttention(
        EMBED_DIM, NUM_HEADS, NUM_GROUPS, apply_causal_mask=True, bias=False, window_size=window_size, **options
    )
    feed_forward = GatedFeedForward(EMBED_DIM, HIDDEN_DIM, activation)
    return DecoderBlock(attention, feed_forward, norm, placement=placement)


def llama() -> tuple[BlockStack, nn.Module]:
    theirs = LlamaModel(LlamaConfig(**SIZES, num_hidden_layers=2, rope_parameters=rope(500.0)))
    norm, position = partial(RMSNorm, eps=1e-3), RotaryEmbedding(EMBED_DIM // NUM_HEADS, 500.0)
    blocks = [gated_block(None, "silu", norm, "before", position=position) for _ in range(2)]
    return BlockStack(blocks, norm(EMBED_DIM)), theirs


def mistral() -> tuple[BlockStack, nn.Module]:
    config = MistralConfig(**SIZES, num_hidden_layers=3, rope_parameters=rope(100.0), sliding_window=WINDOW)
    norm, position = partial(RMSNorm, eps=1e-3), RotaryEmbedding(EMBED_DIM // NUM_HEADS, 100.0)
    blocks = [gated_block(WINDOW, "silu", norm, "before", position=position) for _ in range(3)]
    return BlockStack(blocks, norm(EMBED_DIM)), MistralModel(config)


def gemma2() -> tuple[BlockStack, nn.Module]:
    config = Gemma2Config(
        **SIZES,
        num_hidden_layers=4,
        head_dim=10,
        query_pre_attn_scalar=7,
        attn_logit_softcapping=50.0,
        sliding_window=WINDOW,
        rope_parameters=rope(10000.0),
    )
    norm = partial(RMSNorm, eps=1e-3, unit_offset=True)
    options = {"head_dim": 10, "position": RotaryEmbedding(10), "scale": 7**-0.5, "softcap": 50.0}
    make = partial(gated_block, activation="gelu_tanh", norm=norm, placement="both", **options)
    kinds = {"sliding": partial(make, WINDOW), "full": partial(make, None)}
    return BlockStack.from_pattern("sliding full", 4, norm(EMBED_DIM), **kinds), Gemma2Model(config)


def rope(base: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": base}


class Pair(NamedTuple):
    ours: BlockStack
    theirs: nn.Module

    def expected(self, **inputs: object) -> Tensor:
        with no_float32():
            return self.theirs(**inputs).last_hidden_state

    def cached(self) -> BlockStack:
        for block in self.ours.blocks:
            block.attention.use_kv_cache = True
        return self.ours


# Each with what its norms' weights are drawn around.
FAMILIES = {"llama": (llama, LLAMA, 1.0), "mistral": (mistral, LLAMA, 1.0), "gemma2": (gemma2, GEMMA2, 0.0)}


def equal_pair(family: str, dtype: torch.dtype) -> Pair:
    build, names, norm_weight = FAMILIES[family]
    ours, theirs = (model.to(dtype).eval() for model in build())
    fill(theirs, norm_weight)
    copy_weights(ours, theirs, "layers", names, {"norm": "norm"})
    return Pair(ours, theirs)


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    with no_float32():
        return equal_pair(request.param, torch.float64)


@torch.no_grad()
def test_each_layer_alone(pair: Pair) -> None:
    """From their hidden states before a layer to those after it; the last are those after their final norm."""
    with no_float32():
        states = pair.theirs(inputs_embeds=tokens(2, LENGTH, EMBED_DIM), output_hidden_states=True).hidden_states
    outs = [block(before) for block, before in zip(pair.ours.blocks, states[:-1], strict=True)]
    outs[-1] = pair.ours.norm(outs[-1])
    for out, after in zip(outs, states[1:], strict=True):
        close(out, after)


@torch.no_grad()
def test_whole_stack(pair: Pair) -> None:
    x = tokens(2, LENGTH, EMBED_DIM)
    close(pair.ours(x), pair.expected(inputs_embeds=x))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_whole_stack_as_shipped(family: str) -> None:
    """From token ids, in float32, with their float32 inside."""
    ours, theirs = equal_pair(family, torch.float32)
    ids = torch.randint(8, (2, LENGTH))
    x = theirs.get_input_embeddings()(ids)
    close(ours(x), theirs(input_ids=ids).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("lengths", SPLITS)
@torch.no_grad()
def test_in_chunks_of_any_length(pair: Pair, lengths: list[int]) -> None:
    x, ours = tokens(2, LENGTH, EMBED_DIM), pair.cached()
    out = torch.cat([ours(chunk) for chunk in x.split(lengths, dim=1)], dim=1)
    close(out, pair.expected(inputs_embeds=x))


@pytest.mark.parametrize("lengths", SPLITS)
@torch.no_grad()
def test_each_chunk_as_they_generate(pair: Pair, lengths: list[int]) -> None:
    ours, cache = pair.cached(), DynamicCache(config=pair.theirs.config)
    for chunk in tokens(2, LENGTH, EMBED_DIM).split(lengths, dim=1):
        close(ours(chunk), pair.expected(inputs_embeds=chunk, use_cache=True, **{CACHE: cache}))


@torch.no_grad()
def test_left_padding(pair: Pair) -> None:
    """Rows of 11, 7 and 2 real tokens: in one shot, then in chunks, against their one shot and their generation."""
    x = tokens(3, LENGTH, EMBED_DIM)
    real = padding([(0, 11), (4, 7), (9, 2)], LENGTH)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    whole = pair.expected(inputs_embeds=x, attention_mask=real.long(), position_ids=positions)
    close(pair.ours(x, attention_mask=real)[real], whole[real])

    ours, cache = pair.cached(), DynamicCache(config=pair.theirs.config)
    for begin, end in [(0, 6), (6, 7), (7, 8), (8, 10), (10, 11)]:
        new = slice(begin, end)
        given = {"attention_mask": real[:, :end].long(), "position_ids": positions[:, new]}
        step = pair.expected(inputs_embeds=x[:, new], use_cache=True, **given, **{CACHE: cache})
        out, mask = ours(x[:, new], attention_mask=real[:, new]), real[:, new]
        close(out[mask], whole[:, new][mask])
        close(out[mask], step[mask])
