"""Typed program of a user, in which strict mypy and pyright report nothing.

It names each part of the library that a program of this size needs. `test_typing.py` checks it, and runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from transformer import (
    AttentionError,
    DecoderOnlyTransformer,
    EncoderDecoderTransformer,
    GroupQueryAttention,
    KVCache,
    LayerCache,
    MultiHeadAttention,
    MultiQueryAttention,
    cache_bytes,
)
from transformer.attention import AttentionKeywords, from_torch, to_gqa, to_mha, to_mqa
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock, FeedForward, GatedFeedForward, LayerNorm, RMSNorm
from transformer.checkpoints import load_model, save_model
from transformer.generation import Generated, GenerationKeywords, TopK, generate, perplexity, stream
from transformer.models import (
    DecoderOnlyConfig,
    EncoderTransformer,
    ModelOutput,
    NormConfig,
    UMT5Config,
    UMT5Model,
    mean_pooled,
    t5_config,
)
from transformer.positions import ALiBi, RelativePositionBias, RotaryEmbedding

WIDTH = 32


class Gate(nn.Module):
    """A branch that reads the stream and a picture, and may be asked for its weights."""

    def __init__(self, width: int, picture: int, **options: Unpack[AttentionKeywords]) -> None:
        super().__init__()
        options.setdefault("position", RotaryEmbedding(width // 4))
        self.stream = GroupQueryAttention(
            width, 4, num_kv_heads=2, apply_causal_mask=True, use_kv_cache=True, **options
        )
        self.picture = MultiQueryAttention(width, 4, kv_dim=picture, bias=False, dropout=0.1)
        self.norm = RMSNorm(width, 1e-5)

    def forward(self, x: Tensor, picture: Tensor, picture_mask: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        return x + self.stream(normed) + self.picture(normed, kv=picture, kv_mask=picture_mask)

    def looked_at(self, x: Tensor, picture: Tensor) -> Tensor:
        """Weights [B, H, L, S]."""
        _, weights = self.picture(x, picture, return_weights=True)
        return weights


def block(window_size: int | None = None) -> DecoderBlock:
    attention = MultiHeadAttention(WIDTH, 4, True, True, position=ALiBi(4), window_size=window_size, softcap=30.0)
    return DecoderBlock(attention, GatedFeedForward(WIDTH, 48, "gelu_tanh"), RMSNorm, placement="both")


def encoder_block() -> EncoderBlock:
    attention = MultiHeadAttention(WIDTH, 2, position=RelativePositionBias(2, bidirectional=True), qk_norm=nn.RMSNorm)
    return EncoderBlock(attention, FeedForward(WIDTH, 48), LayerNorm)


def caches_of(stack: BlockStack) -> list[LayerCache]:
    return [cache for layer in stack.blocks if (cache := layer.attention.kv_cache) is not None]


def compose() -> list[int]:
    gate = Gate(WIDTH, 12, window_size=4, num_sinks=1).eval()
    x, picture = torch.randn(2, 3, WIDTH), torch.randn(2, 5, 12)
    out: Tensor = gate.stream(x, expanding_context=True)
    same: Tensor = gate.stream.forward(x)
    both: tuple[Tensor, Tensor] = gate.picture.forward(x, picture, return_weights=True)
    assert out.shape == same.shape == both[0].shape == x.shape
    assert gate.looked_at(x, picture).shape == both[1].shape
    cache = gate.stream.kv_cache
    if cache is not None:
        assert cache["key"].shape[2] == cache.cached_length <= cache.length
    gate.stream.kv_cache = None
    kinds: dict[str, Callable[[], DecoderBlock]] = {"near": lambda: block(4), "far": block}
    stack = BlockStack.from_pattern("near far", 4, RMSNorm(WIDTH), **kinds).eval()
    with torch.inference_mode():
        states: Tensor = stack(x, attention_mask=torch.ones(2, 3, dtype=torch.bool))
    first = stack.blocks[0]
    again: Tensor = first(states, expanding_context=None)
    encoded: Tensor = BlockStack([encoder_block()], nn.LayerNorm(WIDTH))(again)
    conversation = KVCache.from_model(stack).fork().truncate(2)
    return [conversation.length, encoded.shape[0], *(each.cached_length for each in caches_of(stack))]


class Tagger(DecoderOnlyTransformer):
    """A model whose constructor calls that of ours."""

    def __init__(self, width: int, norm: NormConfig) -> None:
        config = DecoderOnlyConfig(50, width, 4, 48, 1, attention="gqa", num_kv_heads=2).with_parts(norm)
        super().__init__(50, width, 4, 48, 1, attention="mqa", norm_eps=config.part(NormConfig).norm_eps)
        self.groups: int | None = config.num_groups


def write(model: DecoderOnlyTransformer, ids: Tensor, **options: Unpack[GenerationKeywords]) -> Tensor:
    try:
        return model.generate(ids, **options)
    except AttentionError as error:
        raise SystemExit(str(error)) from error


class Bytes:
    """A tokenizer."""

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode()


def models(folder: Path) -> int:
    ids = torch.tensor([[1, 2, 3]])
    model = DecoderOnlyTransformer(50, WIDTH, 4, 48, 2, attention="gqa", num_groups=2, stop_tokens=(2,)).eval()
    logits: Tensor = model(ids)
    asked: ModelOutput = model(ids, output_attentions=True, output_hidden_states=True)
    looked_at = () if asked.attentions is None else asked.attentions
    last: Tensor = asked.last_hidden_state
    text = write(model, ids, max_new_tokens=3, temperature=0.7, top_p=0.9, processors=[TopK(5)])
    cached = model.enable_cache(max_length=32)
    for tokens in cached.stream(ids, max_new_tokens=2, use_cache=True):
        logits = cached(tokens.unsqueeze(-1).clone()) if tokens.numel() > 1 else logits
    conversation = cached.kv_cache
    tagger = Tagger(WIDTH, NormConfig(norm_eps=1e-5))
    assert tagger.config.norm_eps == 1e-5
    held = 0 if conversation is None else conversation.cached_length
    model.disable_cache()
    best: Tensor = generate(model, ids, max_new_tokens=2, num_beams=2, use_cache=False)
    came = [tokens.shape[0] for tokens in stream(model, ids, max_new_tokens=2, use_cache=False)]
    seq = EncoderDecoderTransformer(20, 20, WIDTH, 4, 48, 1, num_decoder_layers=2, shared_embeddings=True).eval()
    target: Tensor = seq.generate(ids, max_new_tokens=2)
    thought: Generated = seq.generate(ids, target_ids=ids, max_new_tokens=[2], seed=[1], return_scores=True)
    scored: Generated = generate(
        model, ids, max_new_tokens=2, stop_strings=["a"], tokenizer=Bytes(), return_scores=True
    )
    likely: float = perplexity(model, ids, window=4, stride=2)
    both: Tensor = scored.log_probabilities + thought.tokens.shape[1] + model.score(ids).sum() + likely
    t5 = EncoderDecoderTransformer.from_config(t5_config(20, WIDTH, 4, 48, 1, head_dim=8)).eval()
    umt5 = UMT5Model(UMT5Config(vocab_size=20, d_model=WIDTH, num_heads=4, head_dim=8, d_ff=48, num_layers=1)).eval()
    reader = EncoderTransformer(20, WIDTH, 4, 48, 1, position="learned", max_length=8, norm="layer").eval()
    vector: Tensor = mean_pooled(reader(ids))
    save_model(to_mha(to_mqa(to_gqa(model, 2))) if held < 0 else model, folder / "saved")
    loaded = load_model(folder / "saved", dtype=torch.float32)
    for each in (model, seq, t5, umt5):
        each.tie_weights()
        each.reset_parameters()
    torch_own = from_torch(nn.MultiheadAttention(WIDTH, 4, batch_first=True))
    outputs: list[Tensor] = [text, best, target, vector, loaded(ids), umt5(ids, ids), t5(ids, ids), logits]
    outputs += [last, both, *looked_at]
    return held + len(outputs) + sum(came) + torch_own.num_heads + cache_bytes(model, batch=1, length=3)
