"""Logits, states and gradients of the engines' modules against our own forward."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from transformer.engines import ModularForCausalLM, as_pretrained, register_attention
from transformer.errors import ArgumentError, ShapeError
from transformer.models import DecoderOnlyTransformer

from .compositions import CAPPED, NAMES, VOCABULARY, model_of

CASES = [(name, way) for name in NAMES for way in ("eager", "sdpa") if way == "eager" or name not in CAPPED]
CHUNKS = (6, 1, 1, 4, 1, 7)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def pair(request: pytest.FixtureRequest) -> tuple[DecoderOnlyTransformer, ModularForCausalLM]:
    """A model, and the same in transformers with one implementation of attention."""
    name, way = request.param
    model = model_of(name)
    engine = as_pretrained(model)
    engine.set_attn_implementation(way)
    return model, engine


def some_ids(rows: int = 3, length: int = sum(CHUNKS)) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length))


def masks(ids: Tensor) -> Iterator[Tensor]:
    """Padding on the left, and on the right."""
    left = torch.ones_like(ids)
    left[0, :5] = left[1, :1] = 0
    yield from (left, left.flip(1))


@torch.no_grad()
def test_logits(pair: tuple[DecoderOnlyTransformer, ModularForCausalLM]) -> None:
    model, engine = pair
    ids = some_ids()
    torch.testing.assert_close(engine(ids).logits, model(ids), atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_with_padding(pair: tuple[DecoderOnlyTransformer, ModularForCausalLM]) -> None:
    model, engine = pair
    ids = some_ids()
    for mask in masks(ids):
        got, expected = engine(ids, attention_mask=mask).logits, model(ids, mask)
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_over_caches(pair: tuple[DecoderOnlyTransformer, ModularForCausalLM]) -> None:
    """Chunks and single tokens: a cache that knows the windows, one that keeps all tokens, and a static one."""
    model, engine = pair
    ids = some_ids()
    expected = model(ids)
    for cache in (DynamicCache(config=engine.config), DynamicCache(), StaticCache(engine.config, max_cache_len=24)):
        got = torch.cat([engine(part, past_key_values=cache).logits for part in ids.split(list(CHUNKS), 1)], 1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_of_our_own_kernel(name: str) -> None:
    """`register_attention` serves these modules too, soft caps and all windows included."""
    register_attention()
    model = model_of(name)
    engine = as_pretrained(model)
    engine.set_attn_implementation("modular_attention")
    ids = some_ids()
    torch.testing.assert_close(engine(ids).logits, model(ids), atol=1e-5, rtol=0)
    for mask in masks(ids):
        got, expected = engine(ids, attention_mask=mask).logits, model(ids, mask)
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_gradients(pair: tuple[DecoderOnlyTransformer, ModularForCausalLM]) -> None:
    model, engine = pair
    ids = some_ids()
    engine(ids, labels=ids).loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(ids)[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            got[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bfloat16(name: str) -> None:
    """As far from float32 as our own forward in bfloat16, and 4 roundings more."""
    model = model_of(name)
    ids = some_ids()
    exact = model(ids)
    model.bfloat16()
    engine = as_pretrained(model)
    own, theirs = ((logits.float() - exact).abs().max() for logits in (model(ids), engine(ids).logits))
    assert engine.dtype is torch.bfloat16
    assert theirs <= 1.5 * own + 4 * torch.finfo(torch.bfloat16).eps


@torch.no_grad()
def test_states_and_weights() -> None:
    """Each layer's states and attention weights are those of our own model."""
    model = model_of("gqa, llama3, qk_norm")
    engine = as_pretrained(model)
    engine.set_attn_implementation("eager")
    ids = some_ids()
    expected = model(ids, output_attentions=True, output_hidden_states=True)
    got = engine(ids, output_attentions=True, output_hidden_states=True)
    for ours, theirs in zip(expected.attentions, got.attentions, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    for ours, theirs in zip(expected.hidden_states[:-1], got.hidden_states[:-1], strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_of_the_last_tokens_and_of_embeddings() -> None:
    model = model_of("both, offset, caps, windows")
    engine = as_pretrained(model)
    ids = some_ids()
    expected = model(ids)
    torch.testing.assert_close(engine(ids, logits_to_keep=2).logits, expected[:, -2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        engine(ids, logits_to_keep=torch.tensor([3])).logits, expected[:, 3:4], atol=1e-5, rtol=0
    )
    embedded = engine.get_input_embeddings()(ids)
    torch.testing.assert_close(engine(inputs_embeds=embedded).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_packed_rows_are_told_apart_by_their_positions() -> None:
    """Positions that begin anew make a sequence of its own, as transformers' collators without padding give them."""
    model = model_of("none, windows")
    engine = as_pretrained(model)
    ids = some_ids(1, 12)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    expected = torch.cat((model(ids[:, :5]), model(ids[:, 5:])), 1)
    torch.testing.assert_close(engine(ids, position_ids=positions, use_cache=False).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["eager", "sdpa"])
@torch.no_grad()
def test_a_bool_mask_for_all_layers_says_what_is_visible(way: str) -> None:
    """[B, 1, L, S]; added to scores as numbers it would hide nothing."""
    model = model_of("rotary, mha")
    engine = as_pretrained(model)
    engine.set_attn_implementation(way)
    ids = some_ids()
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool().expand(3, 1, -1, -1)
    torch.testing.assert_close(engine(ids, attention_mask=causal).logits, model(ids), atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_are_those_of_the_columns_of_the_new_tokens() -> None:
    """A mask may be longer, as for a static cache; a shorter one, or one of other rows, is refused."""
    model = model_of("learned, layer norm, plain")
    engine = as_pretrained(model)
    ids = some_ids()
    length = ids.shape[1]
    expected = model(ids)
    longer = torch.ones(3, length + 4)
    torch.testing.assert_close(engine(ids, attention_mask=longer).logits, expected, atol=1e-5, rtol=0)
    cache = DynamicCache(config=engine.config)
    parts = [engine(part, attention_mask=longer, past_key_values=cache).logits for part in ids.split(7, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=0)
    for mask in (torch.ones(3, 1), torch.ones(2, length + 1)):
        with pytest.raises(ShapeError, match=rf"attention_mask: expected \[3, {length + 1}\], over the cached tokens"):
            engine(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_numbers_without_an_embedding_are_named() -> None:
    engine = as_pretrained(model_of("learned, layer norm, plain"))
    with pytest.raises(ArgumentError, match=rf"input_ids: expected numbers from 0 to {VOCABULARY - 1}, got 5 to 61"):
        engine(torch.tensor([[5, VOCABULARY]]))
    with pytest.raises(ArgumentError, match="position_ids: expected numbers from 0 to 63, got 0 to 64"):
        engine(some_ids(1, 65))
