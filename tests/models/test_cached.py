"""Caches of a model: on and off, in all layers or some, unchanged in training, and copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same, cache_snapshot
from tests.models.variants import VARIANTS, VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from transformer import KVCache, cache_bytes
from transformer.errors import ArgumentError, CacheFullError, CacheStateError
from transformer.models import EncoderDecoderTransformer

SOURCE = ids(2, 4, VOCAB + 2)
REAL = padding([(0, 4), (1, 2)], 4)


def conversations(variant: str = "mha rotary") -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """Both models, with a call that takes target tokens alone."""
    both = encoder_decoder(variant)
    return [
        (decoder := decoder_only(variant), lambda tokens, mask=None, model=decoder: model(tokens, mask)),
        (both, lambda tokens, mask=None, model=both: model(SOURCE, tokens, REAL, mask)),
    ]


def sources(model: nn.Module) -> tuple[Tensor, ...]:
    return (SOURCE,) if isinstance(model, EncoderDecoderTransformer) else ()


def own_tokens(model: nn.Module) -> list[object]:
    """Without the source of cross-attention, which any call that records gradients forgets."""
    return [cache_snapshot(block.attention) for block in model.decoder.blocks]


def table(model: nn.Module) -> nn.Parameter:
    return (model.target_embedding if sources(model) else model.embedding).tokens.weight


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_any_split_is_one_shot(variant: str) -> None:
    """With growing caches and caches of a fixed size, and ragged rows; and with caches off again."""
    tokens, real = ids(2, 10), padding([(0, 10), (2, 5)], 10)
    for model, call in conversations(variant):
        whole = call(tokens, real)
        for max_length in (None, 16):
            model.enable_cache(max_length)
            parts = zip(tokens.split([4, 1, 2, 3], 1), real.split([4, 1, 2, 3], 1), strict=True)
            assert_same(torch.cat([call(*part) for part in parts], 1)[real], whole[real], atol=1e-9)
            assert (model.kv_cache.length, model.kv_cache.lengths.tolist()) == (10, [10, 5])
            assert model.clear_cache().kv_cache.length == 0
        assert model.disable_cache().kv_cache is None
        assert torch.equal(call(tokens, real), whole)


def test_training_neither_reads_nor_fills_a_cache() -> None:
    """What is there waits for the next `eval()`."""
    tokens = ids(2, 6)
    for model, call in conversations():
        expected = call(tokens).detach()
        model.enable_cache()
        model.train()
        call(tokens)
        assert kept(model) == [None] * len(kept(model))
        model.eval()
        with torch.no_grad():
            call(tokens[:, :4])
        before = own_tokens(model)
        model.train()
        assert torch.equal(call(tokens), expected)
        call(tokens).sum().backward()
        model.eval()
        assert own_tokens(model) == before
        with torch.no_grad():
            assert_same(call(tokens[:, 4:]), expected[:, 4:])
        # Enabled while training, it begins with the next `eval()`.
        model.disable_cache().train().enable_cache()
        call(tokens)
        assert model.kv_cache.length == 0


def test_some_layers_keep_theirs() -> None:
    for model, call in conversations():
        tokens = ids(2, 5)
        expected = call(tokens)
        model.enable_cache(layers=[1])
        with torch.no_grad():
            assert torch.equal(call(tokens), expected)
            before = kept(model)
            assert {name.split(".")[2] for name in model.kv_cache.layers} == {"1"}
            with pytest.raises(CacheStateError, match=r"^layers: expected all to have read the same tokens"):
                call(tokens)
        assert kept(model) == before


def test_refusals() -> None:
    for model, call in conversations():
        for max_length in (0, -1, 2.0, True):
            with pytest.raises(ArgumentError, match=r"^max_length: expected a whole number"):
                model.enable_cache(max_length)
        for layers in ([], [2], [-1]):
            with pytest.raises(ArgumentError, match=r"^layers: expected indices from 0 to 1"):
                model.enable_cache(layers=layers)
        assert model.kv_cache is None
        model.enable_cache(max_length=5)
        with torch.no_grad():
            call(ids(2, 5))
            before = kept(model)
            with pytest.raises(CacheFullError):
                call(ids(2, 1))
            with pytest.raises(CacheStateError, match=r"^enable_cache: a conversation is under way"):
                model.enable_cache()
        assert kept(model) == before


@torch.no_grad()
def test_a_cleared_cache_is_enabled_anew() -> None:
    """With the new size and in the named layers, independent of earlier settings."""
    for model, call in conversations():
        model.enable_cache(max_length=20)
        call(ids(2, 5))
        model.kv_cache.clear()
        model.enable_cache(max_length=4)
        with pytest.raises(CacheFullError):
            call(ids(2, 5))
        model.enable_cache(layers=[0])
        call(ids(2, 5))
        assert {name.split(".")[2] for name in model.kv_cache.layers} == {"0"}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_take_a_live_cache_along(way: Callable[[nn.Module], nn.Module]) -> None:
    """Issues: transformers#32681. Copies take a live cache along, and go on apart; tied weights stay tied."""
    for variant in ("gqa rotary, window, both", "mha learned, after"):
        for model, _ in conversations(variant):
            given = sources(model)
            model.enable_cache(max_length=20)
            model(*given, ids(2, 5))
            other = way(model)
            assert_same(other(*given, ids(2, 3, seed=1)), model(*given, ids(2, 3, seed=1)))
            before = kept(model)
            other(*given, ids(2, 1))
            assert kept(model) == before
            assert other.head.proj.weight is table(other)


@torch.no_grad()
def test_caches_are_no_weights() -> None:
    for model, call in conversations("mha learned, after"):
        names = list(model.state_dict())
        model.enable_cache()
        call(ids(2, 5))
        assert list(model.state_dict()) == names
        half = copy.deepcopy(model).to(torch.float32)
        assert half.head.proj.weight is table(half)
        assert {cache["key"].dtype for cache in half.kv_cache.layers.values()} == {torch.float32}
        given = sources(model)
        new = ids(2, 2, seed=4)
        mask = (REAL, None) if given else ()
        assert_same(half(*given, new, *mask), model(*given, new, *mask).float(), atol=1e-4)


@torch.no_grad()
def test_one_model_many_conversations() -> None:
    """Removed and installed, also in another model with the same weights; forked; with selected rows, and truncated."""
    for (model, call), (_, other_call) in zip(conversations(), conversations(), strict=True):
        tokens = ids(2, 6)
        whole = call(tokens)
        model.enable_cache()
        call(tokens[:, :4])
        fork = model.kv_cache.fork()
        call(ids(2, 2, seed=9))
        model.kv_cache.truncate(4)
        assert_same(call(tokens[:, 4:]), whole[:, 4:])
        model.kv_cache.remove(model)
        fork.install(model)
        assert_same(call(tokens[:, 4:]), whole[:, 4:])
        model.clear_cache()
        assert_same(call(tokens), other_call(tokens))
    assert isinstance(model.kv_cache, KVCache)


@torch.no_grad()
def test_a_layer_that_fails_leaves_every_layer() -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for model, call in conversations("gqa relative, pattern"):
        model.enable_cache()
        call(ids(2, 4))
        before = kept(model)
        for part in (model.decoder.blocks[0], model.decoder.blocks[1].feed_forward, model.decoder.norm):
            hook = part.register_forward_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                call(ids(2, 2))
            hook.remove()
            assert kept(model) == before


@torch.no_grad()
def test_a_conversation_is_assigned_as_to_one_module() -> None:
    """None clears it; another conversation is installed and continues."""
    for model, call in conversations():
        tokens = ids(2, 6)
        whole = call(tokens)
        model.enable_cache()
        call(tokens[:, :4])
        conversation = model.kv_cache.remove(model)
        assert torch.equal(call(tokens), whole)
        model.kv_cache = None
        assert model.kv_cache.length == 0
        model.kv_cache = conversation
        assert_same(call(tokens[:, 4:]), whole[:, 4:])


def test_what_cannot_be_assigned_is_refused() -> None:
    model = decoder_only("mha rotary")
    with pytest.raises(ArgumentError, match="kv_cache: expected a KVCache or None, got dict"):
        model.enable_cache().kv_cache = {}
    conversation = model.kv_cache.remove(model)
    model.disable_cache()
    with pytest.raises(CacheStateError, match=r"kv_cache: expected caches to be on.*enable_cache\(\) first"):
        model.kv_cache = conversation
    assert model.kv_cache is None
    model.kv_cache = None
    with torch.no_grad():
        model.enable_cache()(ids(1, 3))
        conversation = model.kv_cache.remove(model)
    for off in (model.train(), model.eval().disable_cache()):
        with pytest.raises(CacheStateError, match="model: expected its caches to be on"):
            conversation.install(off)
    model.decoder.blocks[0].attention.kv_cache = next(iter(conversation.layers.values()))
    with pytest.raises(CacheStateError, match="enable_cache: a conversation is under way"):
        model.enable_cache()


@torch.no_grad()
def test_bytes_are_known_before_caches_are_on() -> None:
    """In every state of the model they are those that enabling takes, to the byte where the size is fixed."""
    for model, call in conversations("gqa relative, pattern"):
        given = (2, 5, SOURCE.shape[1])
        off = cache_bytes(model, *given)
        assert off == 2 * cache_bytes(model.config, *given) > 0, "float64, where the configuration says float32"
        model.enable_cache()
        assert cache_bytes(model, *given) == cache_bytes(model.train(), *given) == off
        model.eval().disable_cache()
        assert cache_bytes(nn.ModuleDict({"wrapped": model}), *given) == off
        call(ids(2, 5))
        model.enable_cache(64, layers=[0])
        some = cache_bytes(model, *given)
        call(ids(2, 5))
        assert some == model.kv_cache.nbytes
