"""Tour, third part: stacks of blocks and whole models, whose layers' caches are one `KVCache`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tour.modules import E, H, same, tokens
from transformer import (
    DecoderOnlyTransformer,
    EncoderDecoderTransformer,
    GroupQueryAttention,
    KVCache,
    MultiHeadAttention,
    MultiQueryAttention,
)
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.positions import RotaryEmbedding

pytestmark = pytest.mark.tour

V = 30
"""Words of the vocabulary."""


def stack(cached: bool = True) -> BlockStack:
    """Blocks of three kinds: one that sees everything, one with a window, one with a window and sinks."""
    torch.manual_seed(1)
    options = {"apply_causal_mask": True, "use_kv_cache": cached, "position": RotaryEmbedding(E // H)}
    layers = [
        MultiHeadAttention(E, H, **options),
        GroupQueryAttention(E, H, 2, window_size=3, **options),
        MultiQueryAttention(E, H, window_size=4, num_sinks=1, **options),
    ]
    blocks = [DecoderBlock(layer, GatedFeedForward(E, 24), RMSNorm) for layer in layers]
    return BlockStack(blocks, RMSNorm(E)).double()


def decoder() -> DecoderOnlyTransformer:
    torch.manual_seed(1)
    model = DecoderOnlyTransformer(V, E, H, 32, 2, attention="gqa", num_groups=2).double()
    return model.eval().enable_cache()


@torch.no_grad()
def test_a_stack_of_any_layers_is_one_shot_too() -> None:
    """Each layer keeps its own window; one mask serves all."""
    x = tokens(2, 9)
    mask = torch.ones(2, 9).bool()
    mask[0, :3] = False
    whole = stack(cached=False)(x, attention_mask=mask)
    cached = stack()
    outs = [cached(part, attention_mask=own) for part, own in zip(x.split(2, 1), mask.split(2, 1), strict=True)]
    same(torch.cat(outs, 1), whole)
    cache = KVCache.from_model(cached)
    assert cache.lengths.tolist() == [6, 9]
    assert [layer.cached_length for layer in cache.layers.values()] == [9, 3, 5]


@torch.no_grad()
def test_a_step_is_all_or_nothing() -> None:
    """What fails inside a transaction leaves no layer further than the others."""
    model, x = stack(), tokens(1, 4)
    model(x)
    cache = KVCache.from_model(model)

    def fails_in_the_middle() -> None:
        with cache.transaction():
            model(tokens(1, 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails_in_the_middle()
    assert [layer.length for layer in cache.layers.values()] == [4, 4, 4]
    more = tokens(1, 2)
    same(model(more), stack(cached=False)(torch.cat((x, more), 1))[:, 4:])


@torch.no_grad()
def test_one_model_has_many_conversations(tmp_path: Path) -> None:
    """Caches are taken out and put back, forked, joined, saved and loaded as one."""
    model, prompts, x = stack(), (tokens(1, 3), tokens(1, 5)), tokens(2, 1)
    caches = []
    for prompt in prompts:
        model(prompt)
        caches.append(KVCache.from_model(model).remove(model))
    caches[0].save(tmp_path / "first.safetensors")
    KVCache.join([KVCache.load(tmp_path / "first.safetensors"), caches[1].fork()]).install(model)
    out = model(x)
    for row, prompt in enumerate(prompts):
        same(out[row, -1], stack(cached=False)(torch.cat((prompt, x[row : row + 1]), 1))[0, -1])
    assert [cache.length for cache in caches] == [3, 5]


def test_generation_is_what_forward_says() -> None:
    """Greedy tokens are the largest logits of a plain forward over all that came before."""
    model, prompt = decoder(), torch.tensor([[3, 1, 4]])
    ids = model.generate(prompt, max_new_tokens=6)
    plain = decoder().disable_cache()
    with torch.no_grad():
        for length in range(3, 9):
            assert ids[0, length] == plain(ids[:, :length])[0, -1].argmax()


def test_a_stream_is_the_same_as_it_comes() -> None:
    """Token by token, also for prompts of different lengths."""
    prompts = torch.tensor([[0, 0, 3], [5, 9, 2]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]]).bool()
    whole = decoder().generate(prompts, mask, max_new_tokens=5)
    streamed = torch.stack(list(decoder().stream(prompts, mask, max_new_tokens=5)), 1)
    assert torch.equal(streamed, whole[:, 3:])
    alone = decoder().generate(torch.tensor([[3]]), max_new_tokens=5)
    assert torch.equal(alone[0, 1:], whole[0, 3:])


def test_a_chat_goes_on_where_it_was() -> None:
    """A model keeps what it has read: the next turn hands in the new tokens alone."""
    model, turns = decoder(), (torch.tensor([[3, 1]]), torch.tensor([[7, 2]]))
    model.clear_cache()
    first = model.generate(turns[0], max_new_tokens=3)
    second = model.generate(turns[1], max_new_tokens=3)
    text = torch.cat((first, turns[1]), 1)
    assert torch.equal(second[:, 2:], decoder().generate(text, max_new_tokens=3)[:, text.shape[1] :])


def test_an_encoder_decoder_reads_its_source_once() -> None:
    """The decoder's cached steps give the logits of one forward over all tokens."""
    torch.manual_seed(1)
    model = EncoderDecoderTransformer(V, V, E, H, 32, 2).double().eval()
    source, target = torch.randint(V, (2, 5)), torch.randint(V, (2, 4))
    with torch.no_grad():
        whole = model(source, target)
        model.enable_cache()
        encoded = model.encode(source)
        steps = [model(None, token, encoder_hidden_states=encoded) for token in target.split(1, 1)]
    same(torch.cat(steps, 1), whole)
