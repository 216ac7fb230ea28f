"""Weights of transformers' attention layers in our modules: the same outputs, cached and uncached."""

from inspect import signature

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.masking_utils import chunked_overlay
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralConfig
from transformers.models.t5.modeling_t5 import T5Attention, T5Config

from transformer import GroupQueryAttention, MultiHeadAttention
from transformer.positions import RelativePositionBias, RotaryEmbedding

EMBED_DIM, NUM_HEADS, LENGTH = 48, 6, 11
SPLITS = [[LENGTH], [1] * LENGTH, [4, 1, 6]]
# Their name of the argument that takes a cache, which changed within version 5.
CACHE = "cache" if "cache" in signature(LlamaAttention.forward).parameters else "past_key_values"


def run_chunks(attention: GroupQueryAttention | MultiHeadAttention, x: Tensor, lengths: list[int]) -> Tensor:
    attention.use_kv_cache, attention.kv_cache = True, None
    with torch.no_grad():
        return torch.cat([attention(chunk) for chunk in x.split(lengths, dim=1)], dim=1)


def copy_projections(
    ours: torch.nn.Module, theirs: torch.nn.Module, names: str = "q_proj k_proj v_proj o_proj"
) -> None:
    for own, other in zip(("q_proj", "k_proj", "v_proj", "out_proj"), names.split(), strict=True):
        getattr(ours, own).load_state_dict(getattr(theirs, other).state_dict())


@pytest.mark.parametrize("num_groups", [6, 2, 1])
@pytest.mark.parametrize("lengths", SPLITS)
def test_llama(num_groups: int, lengths: list[int]) -> None:
    config = LlamaConfig(
        hidden_size=EMBED_DIM,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=num_groups,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    theirs, rotary = LlamaAttention(config, 0).eval(), LlamaRotaryEmbedding(config)
    ours = GroupQueryAttention(
        EMBED_DIM, NUM_HEADS, num_groups, True, bias=False, position=RotaryEmbedding(EMBED_DIM // NUM_HEADS)
    )
    copy_projections(ours, theirs)
    x = torch.randn(2, LENGTH, EMBED_DIM)
    with torch.no_grad():
        whole = theirs(x, position_embeddings=rotary(x, torch.arange(LENGTH)[None]), attention_mask=None)[0]
        torch.testing.assert_close(ours(x), whole, rtol=0, atol=1e-5)

        # Their cached way too: the prompt at once, then token by token.
        cache, outs = DynamicCache(config=config), []
        for begin, end in [(0, 5), *((i, i + 1) for i in range(5, LENGTH))]:
            angles = rotary(x, torch.arange(begin, end)[None])
            given = {"position_embeddings": angles, "attention_mask": None, CACHE: cache}
            outs.append(theirs(x[:, begin:end], **given)[0])
    torch.testing.assert_close(run_chunks(ours, x, lengths), torch.cat(outs, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 4, 20])
@pytest.mark.parametrize("lengths", SPLITS)
def test_mistral_with_its_window(window: int, lengths: list[int]) -> None:
    """Its `sliding_window` W counts the query itself when its own mask says so, as ours does."""
    config = MistralConfig(
        hidden_size=EMBED_DIM,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=2,
        num_hidden_layers=1,
        sliding_window=window,
        attn_implementation="sdpa",
    )
    theirs, rotary = MistralAttention(config, 0).eval(), LlamaRotaryEmbedding(config)
    ours = GroupQueryAttention(
        EMBED_DIM, NUM_HEADS, 2, True, bias=False, position=RotaryEmbedding(EMBED_DIM // NUM_HEADS), window_size=window
    )
    copy_projections(ours, theirs)
    x = torch.randn(2, LENGTH, EMBED_DIM)
    position = torch.arange(LENGTH)
    distance = position[:, None] - position
    mask = ((distance >= 0) & (distance < window))[None, None]
    with torch.no_grad():
        whole = theirs(x, position_embeddings=rotary(x, position[None]), attention_mask=mask)[0]
        torch.testing.assert_close(ours(x), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(run_chunks(ours, x, lengths), whole, rtol=0, atol=1e-5)


def t5(is_decoder: bool) -> tuple[T5Attention, T5Config]:
    config = T5Config(
        d_model=EMBED_DIM, d_kv=8, num_heads=NUM_HEADS, is_decoder=is_decoder, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=10,
    )  # fmt: skip
    return T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval(), config


@pytest.mark.parametrize("is_decoder", [True, False])
def test_t5_self_attention(is_decoder: bool) -> None:
    theirs, _ = t5(is_decoder)
    position = RelativePositionBias(NUM_HEADS, 8, 10, bidirectional=not is_decoder)
    position.embedding.load_state_dict(theirs.relative_attention_bias.state_dict())
    ours = MultiHeadAttention(EMBED_DIM, NUM_HEADS, is_decoder, bias=False, position=position, scale=1.0)
    copy_projections(ours, theirs, "q k v o")
    x = torch.randn(2, LENGTH, EMBED_DIM)
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None] if is_decoder else None
    with torch.no_grad():
        whole = theirs(x, mask=mask)[0]
        torch.testing.assert_close(ours(x), whole, rtol=0, atol=1e-5)
    if is_decoder:
        for lengths in SPLITS:
            torch.testing.assert_close(run_chunks(ours, x, lengths), whole, rtol=0, atol=1e-5)


def test_t5_cross_attention() -> None:
    _, config = t5(is_decoder=True)
    theirs = T5Attention(config, has_relative_attention_bias=False, layer_idx=0).eval()
    ours = MultiHeadAttention(EMBED_DIM, NUM_HEADS, use_kv_cache=True, bias=False, scale=1.0)
    copy_projections(ours, theirs, "q k v o")
    x, source = torch.randn(2, 4, EMBED_DIM), torch.randn(2, LENGTH, EMBED_DIM)
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    with torch.no_grad():
        for step in range(4):
            new = x[:, step : step + 1]
            expected = theirs(new, key_value_states=source, **{CACHE: cache})[0]
            torch.testing.assert_close(ours(new, kv=source), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 6])
@torch.inference_mode()
def test_chunked_local_attention_over_a_sliding_cache(padding: int) -> None:
    """Llama 4's mask as a rule: a window of one chunk is all that the cache needs."""
    rotary, x = RotaryEmbedding(8), torch.randn(2, 15, EMBED_DIM)
    options = {"apply_causal_mask": True, "position": rotary}
    module = GroupQueryAttention(
        EMBED_DIM, NUM_HEADS, 2, **options, use_kv_cache=True, window_size=4, mask_rule=lambda q, k: q // 4 == k // 4
    )
    plain = GroupQueryAttention(EMBED_DIM, NUM_HEADS, 2, **options)
    plain.load_state_dict(module.state_dict())
    mask = torch.arange(15) >= torch.tensor([[0], [padding]])
    row, q, k = torch.meshgrid(torch.arange(2), torch.arange(15), torch.arange(15), indexing="ij")
    theirs = chunked_overlay(4, torch.tensor([0, padding]))(row, 0, q, k) & mask[row, k]
    expected = plain(x, attention_mask=mask, attn_bias=theirs.unsqueeze(1))
    parts = zip(x.split([1, 6, 1, 1, 6], 1), mask.split([1, 6, 1, 1, 6], 1), strict=True)
    out = torch.cat([module(part, attention_mask=real) for part, real in parts], 1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert module.kv_cache.cached_length == 4
