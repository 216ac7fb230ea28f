"""Wrapped models: caches are found inside wrappers of blocks, attentions and projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.conversations import assert_same
from tests.integration import models as own
from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding, tokens
from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, KVCache
from transformer.models import DecoderOnlyTransformer as Decoder  # noqa: F401

Model = DecoderOnlyTransformer | EncoderDecoderTransformer

PROMPT, SOURCE, TURN = ids(2, 4), ids(2, 5, VOCAB + 2), ids(2, 3, seed=5)
REAL = padding([(0, 4), (1, 3)], 4)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


class Sharded(nn.Module):
    """As FSDP's wrapper names what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *given: object, **named: object) -> object:
        return self._fsdp_wrapped_module(*given, **named)


def blocks(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Model], None]:
    """Puts something around each block of the decoder."""

    def change(model: Model) -> None:
        for number, block in enumerate(model.decoder.blocks):
            model.decoder.blocks[number] = wrap(block)

    return change


def attentions(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Model], None]:
    """Puts something around each attention of the decoder, also those that read a source."""

    def change(model: Model) -> None:
        for block in model.decoder.blocks:
            block.attention = wrap(block.attention)
            if block.cross_attention is not None:
                block.cross_attention = wrap(block.cross_attention)

    return change


def compile_blocks_in_place(model: Model) -> None:
    for block in model.decoder.blocks:
        block.compile(backend="eager")


UNNAMED: dict[str, Callable[[Model], None]] = {
    "checkpoint_wrapper(block)": blocks(checkpoint_wrapper),
    "checkpoint_wrapper(attention)": attentions(checkpoint_wrapper),
    "torch.compile(block)": blocks(compiled),
    "torch.compile(attention)": attentions(compiled),
    "block.compile()": compile_blocks_in_place,
    "FSDP(block)": blocks(Sharded),
    "torch.compile(checkpoint_wrapper(block))": blocks(lambda block: compiled(checkpoint_wrapper(block))),
}
"""Wrappers whose names are left out of the paths of caches."""

NAMED: dict[str, Callable[[Model], None]] = {
    "adapter around a block": blocks(own.Adapter),
    "adapter around a block, forwarding": blocks(own.ForwardingAdapter),
    "adapter around an attention": attentions(own.Adapter),
    "adapter around an attention, forwarding": attentions(own.ForwardingAdapter),
    "own block": blocks(own.OwnBlock),
    "own block without step": blocks(own.OwnBlockWithoutStep),
    "one block wrapped alone": lambda model: model.decoder.blocks.__setitem__(
        1, own.Adapter(checkpoint_wrapper(model.decoder.blocks[1]))
    ),
}
"""Modules of a user's own: the caches' paths name them."""

EVERY = {**UNNAMED, **NAMED}


def params(names: Iterable[str]) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow if "compile" in name else ()) for name in names]


def real_tokens(name: str) -> Tensor | None:
    """A block that drops the step drops the padding mask with it."""
    return None if "without step" in name else REAL


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def pair(change: Callable[[Model], None], variant: str = "gqa relative, pattern") -> tuple[Model, Model]:
    """A wrapped model and a plain one with the same weights."""
    model, plain = decoder_only(variant), decoder_only(variant)
    change(model)
    return model.eval(), plain


@pytest.mark.slow
@pytest.mark.parametrize("name", params(EVERY))
def test_generation(name: str) -> None:
    """Cached equals uncached equals the plain model, padded prompts, beams and streams too; nothing stays."""
    model, plain = pair(EVERY[name])
    assert_same(model(PROMPT), plain(PROMPT))
    for given in ({}, {"num_beams": 2}, {"prefill_chunk_size": 2}, {"use_cache": False}):
        expected = plain.generate(PROMPT, real_tokens(name), max_new_tokens=6, **given)
        assert_same(model.generate(PROMPT, real_tokens(name), max_new_tokens=6, **given), expected)
    for use_cache in (True, False):
        left = list(islice(model.stream(PROMPT, max_new_tokens=9, use_cache=use_cache), 4))
        assert_same(left, list(islice(plain.stream(PROMPT, max_new_tokens=9), 4)))
    assert model.kv_cache is None
    own.assert_without_caches(model)


@pytest.mark.parametrize("name", params(EVERY))
def test_conversations(name: str) -> None:
    """enable_cache, kv_cache, turns, truncate, clear and disable_cache are those of the plain model."""
    model, plain = pair(EVERY[name])
    model.enable_cache(max_length=30), plain.enable_cache(max_length=30)
    for one in (model, plain):
        one.generate(PROMPT, max_new_tokens=3)
    assert_same(model(TURN), plain(TURN))
    assert_same(next(model.stream(TURN, max_new_tokens=2)), next(plain.stream(TURN, max_new_tokens=2)))
    assert len(model.kv_cache.layers) == 2
    assert model.kv_cache.length == plain.kv_cache.length == 4 + 3 + 3 + 3 + 1
    layers = zip(model.kv_cache.layers.values(), plain.kv_cache.layers.values(), strict=True)
    assert all(ours.max_length == theirs.max_length for ours, theirs in layers)
    for one in (model, plain):
        one.kv_cache.truncate(13)
    assert_same(model(TURN), plain(TURN))
    model.clear_cache(), plain.clear_cache()
    assert model.kv_cache.length == 0
    assert_same(model(TURN), plain(TURN))
    model.disable_cache()
    own.assert_without_caches(model)


@pytest.mark.parametrize("name", params(UNNAMED))
def test_paths_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    """So a conversation goes from the plain model into the wrapped one, also through a file, and back."""
    model, plain = pair(UNNAMED[name])
    check_exchange(model.enable_cache(), plain.enable_cache(), tmp_path / "file")


def check_exchange(model: nn.Module, plain: Model, file: Path) -> None:
    stays = decoder_only("gqa relative, pattern").enable_cache()
    plain(PROMPT), stays(PROMPT)
    plain.kv_cache.save(file)
    assert KVCache.from_model(model).remove(model).layers == {}
    there = plain.kv_cache.remove(plain)
    there.install(model)
    assert_same(model(TURN), stays(TURN))
    assert list(KVCache.from_model(model).layers) == list(stays.kv_cache.layers)
    KVCache.from_model(model).remove(model).install(plain)
    assert_same(plain(TURN[:, :1]), stays(TURN[:, :1]))
    KVCache.load(file).install(model)
    again = decoder_only("gqa relative, pattern").enable_cache()
    again(PROMPT)
    assert_same(model(TURN), again(TURN))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peft", "torch.compile(model)", "FSDP(model)", "checkpoint_wrapper(model)"])
def test_paths_in_wrapped_whole_models(name: str, tmp_path: Path) -> None:
    """Adapters begin at 0, so that peft's model gives what the plain one gives."""
    model, plain = decoder_only("gqa relative, pattern").enable_cache(), decoder_only("gqa relative, pattern")
    wrap = {
        "peft": lambda inner: get_peft_model(inner, LoraConfig(target_modules=["q_proj", "v_proj"])).double(),
        "torch.compile(model)": compiled,
        "FSDP(model)": Sharded,
        "checkpoint_wrapper(model)": checkpoint_wrapper,
    }[name]
    wrapped = wrap(model).eval()
    check_exchange(wrapped, plain.enable_cache(), tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize("name", params(EVERY))
def test_encoder_decoders(name: str) -> None:
    model, plain = encoder_decoder(), encoder_decoder()
    EVERY[name](model)
    model.eval()
    real = padding([(0, 5), (0, 3)], 5)
    assert_same(model(SOURCE, PROMPT, real), plain(SOURCE, PROMPT, real))
    for given in ({}, {"num_beams": 2}, {"use_cache": False}):
        expected = plain.generate(SOURCE, real, max_new_tokens=5, **given)
        assert_same(model.generate(SOURCE, real, max_new_tokens=5, **given), expected)
    own.assert_without_caches(model)
    model.enable_cache(), plain.enable_cache()
    for one in (model, plain):
        one.generate(SOURCE, max_new_tokens=5)
    assert model.kv_cache.length == plain.kv_cache.length == 6
    streamed = list(islice(model.stream(SOURCE, max_new_tokens=5), 3))
    assert_same(streamed, list(islice(plain.stream(SOURCE, max_new_tokens=5), 3)))


@pytest.mark.parametrize("name", params(EVERY))
@pytest.mark.parametrize("cached", [False, True])
def test_plans(name: str, cached: bool) -> None:
    """A stack plans its steps with any blocks, and they equal those of its own forward."""
    model, plain = pair(EVERY[name])
    if cached:
        model.enable_cache(), plain.enable_cache()
        model(PROMPT), plain(PROMPT)
    x, mask = tokens(2, 4, 16), real_tokens(name)
    steps, expected = model.decoder.plan(x, None, mask), plain.decoder.plan(x, None, mask)
    assert len(steps) == len(expected) == 2
    assert [step.rule for step in steps] == [step.rule for step in expected]
    real = torch.ones(2, 4, dtype=torch.bool) if mask is None else mask
    assert_same(model.decoder(x, steps=steps)[real], plain.decoder(x, steps=expected)[real])


@pytest.mark.parametrize(
    "names", [["q_proj", "v_proj"], ["k_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj"]]
)
def test_adapters_in_place_of_projections(names: list[str]) -> None:
    """Cached equals uncached, and the adapters count."""
    model, plain = decoder_only(), decoder_only()
    for attention in own.attentions(model):
        for name in names:
            setattr(attention, name, own.LowRank(getattr(attention, name)))
    assert not torch.allclose(model(PROMPT), plain(PROMPT), atol=1e-3)
    assert_same(
        model.generate(PROMPT, REAL, max_new_tokens=8),
        model.generate(PROMPT, REAL, max_new_tokens=8, use_cache=False),
    )
    expected = model(torch.cat((PROMPT, TURN), 1))
    model.enable_cache()
    assert_same(torch.cat((model(PROMPT), model(TURN)), 1), expected)
