"""Vectors in place of ids: equal to the ids that they embed in every way of generating, and trained as soft prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.variants import VARIANTS, VOCAB, decoder_only, encoder_decoder, ids
from tests.peers.test_transformers_generation import pair
from tests.setups import padding
from transformer import DecoderOnlyTransformer
from transformer.errors import ArgumentError, DtypeError, ShapeError
from transformer.generation import generate, stream

__all__ = ["pair"]

PROMPT, REAL = ids(3, 5), padding([(0, 5), (2, 3), (0, 4)], 5)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no caches": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 2},
    "sampled": {"temperature": 1.0, "seed": 5},
    "samples": {"temperature": 1.0, "num_return_sequences": 2, "seed": 5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams without caches": {"num_beams": 2, "use_cache": False},
    "stops": {"stop_tokens": (3, 7)},
}


def embedded(model: DecoderOnlyTransformer, tokens: Tensor = PROMPT) -> Tensor:
    return model.embedding(tokens).detach()


@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "padding"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_forward(variant: str, real: Tensor | None) -> None:
    model = decoder_only(variant)
    vectors = embedded(model)
    if real is not None:
        vectors = vectors.masked_fill(~real.unsqueeze(-1), 9.0)
    assert torch.equal(model(inputs_embeds=vectors, attention_mask=real), model(PROMPT, real))
    output = model(inputs_embeds=vectors, attention_mask=real, labels=PROMPT)
    assert torch.equal(output.loss, model(PROMPT, real, labels=PROMPT).loss)


@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "padding"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("live", [False, True], ids=["", "conversation"])
def test_generate(way: str, real: Tensor | None, live: bool) -> None:
    """The new tokens alone, as after ids; a conversation goes on after them."""
    model, options = decoder_only("gqa rotary, window, both"), {"max_new_tokens": 6, **WAYS[way]}
    expected = decoder_only("gqa rotary, window, both")
    if live and options.get("use_cache", True):
        model.enable_cache()
        expected.enable_cache()
    whole = expected.generate(PROMPT, real, **options)
    out = model.generate(inputs_embeds=embedded(model), attention_mask=real, **options)
    assert torch.equal(out, whole[:, PROMPT.shape[1] :])
    if live and options.get("use_cache", True):
        assert torch.equal(model.kv_cache.lengths, expected.kv_cache.lengths)
        turn = ids(out.shape[0], 2, seed=8)
        assert torch.equal(model.generate(turn, max_new_tokens=3), expected.generate(turn, max_new_tokens=3))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.4}], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_streams(options: dict[str, Any], use_cache: bool) -> None:
    model = decoder_only()
    given = {"max_new_tokens": 5, "use_cache": use_cache, **options}
    expected = model.generate(inputs_embeds=embedded(model), attention_mask=REAL, **given)
    found = list(model.stream(inputs_embeds=embedded(model), attention_mask=REAL, **given))
    assert torch.equal(torch.stack(found, 1), expected)
    assert torch.equal(generate(model, inputs_embeds=embedded(model), attention_mask=REAL, **given), expected)
    assert torch.equal(
        torch.stack(list(stream(model, None, REAL, inputs_embeds=embedded(model), **given)), 1), expected
    )


@pytest.mark.parametrize("beams", [1, 2])
def test_processors_see_new_tokens_alone(beams: int) -> None:
    model, seen = decoder_only(), []

    def note(tokens: Tensor, scores: Tensor) -> Tensor:
        seen.append(tokens.clone())
        return scores

    out = model.generate(inputs_embeds=embedded(model), max_new_tokens=4, processors=[note], num_beams=beams)
    assert [tokens.shape for tokens in seen] == [(3 * beams, step) for step in range(4)]
    if beams == 1:
        assert torch.equal(seen[-1], out[:, :3])


def test_max_length_counts_the_vectors() -> None:
    model = decoder_only()
    assert model.generate(inputs_embeds=embedded(model), max_length=9).shape == (3, 4)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "left"])
def test_tokens_of_transformers(pair: tuple[DecoderOnlyTransformer, nn.Module], real: Tensor | None) -> None:
    ours, theirs = pair
    mask = None if real is None else real.byte().sort(-1).values.bool()
    tokens = PROMPT + 1
    for options in ({}, {"num_beams": 2, "early_stopping": "never"}, {"repetition_penalty": 1.7}):
        shown = torch.ones_like(tokens) if mask is None else mask.long()
        vectors = ours.embedding(tokens).detach()
        given = {"max_new_tokens": 6, **options}
        expected = theirs.generate(inputs_embeds=vectors, attention_mask=shown, do_sample=False, **given)
        assert torch.equal(ours.generate(inputs_embeds=vectors, attention_mask=mask, **given), expected)


# --- encoder-decoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "padding"])
def test_sources(real: Tensor | None, options: dict[str, Any]) -> None:
    model, source, target = encoder_decoder(), ids(3, 5, VOCAB + 2), ids(3, 4)
    vectors = model.source_embedding(source).detach()
    given = {"inputs_embeds": vectors, "source_mask": real}
    with torch.no_grad():
        assert torch.equal(model(target_ids=target, **given), model(source, target, real))
        assert torch.equal(model(**given), model(source, None, real))
    expected = model.generate(source, real, max_new_tokens=5, **options)
    assert torch.equal(model.generate(max_new_tokens=5, **given, **options), expected)
    if "num_beams" not in options:
        found = list(model.stream(max_new_tokens=5, **given, **options))
        assert torch.equal(torch.stack(found, 1), expected)


def test_gradients_reach_the_vectors_of_a_source() -> None:
    model, source = encoder_decoder().requires_grad_(False), ids(2, 5)
    vectors = model.source_embedding(source).detach().requires_grad_()
    model(inputs_embeds=vectors, labels=ids(2, 4)).loss.backward()
    assert vectors.grad.abs().sum() > 0


# --- soft prompts -----------------------------------------------------------------------------------------------------


def test_a_soft_prompt_alone_is_trained_and_used() -> None:
    model = decoder_only(dtype=torch.float32).requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    soft = nn.Parameter(torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0)))
    rows = torch.tensor([[2, 9, 4, 1, 7, 7, 3]])
    labels = torch.cat((torch.full((1, 3), -100), rows), 1)
    optimizer, losses = torch.optim.Adam([soft], lr=0.1), []
    for _ in range(150):
        output = model(inputs_embeds=torch.cat((soft, model.embedding(rows)), 1), labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    # A soft prompt that is read first, and a text after it, are the vectors of both.
    both = torch.cat((soft.detach(), model.embedding(rows[:, :2])), 1)
    expected = model.generate(inputs_embeds=both, max_new_tokens=4)
    model.enable_cache()
    with torch.no_grad():
        model(inputs_embeds=soft)
    assert torch.equal(model.generate(rows[:, :2], max_new_tokens=4)[:, 2:], expected)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["forward", "generate", "stream"])
def test_exactly_one_of_ids_and_vectors(call: str) -> None:
    model, options = decoder_only(), {} if call == "forward" else {"max_new_tokens": 2}
    for given in ({}, {"input_ids": PROMPT, "inputs_embeds": embedded(model)}):
        with pytest.raises(ArgumentError, match=r"^input_ids, inputs_embeds: expected exactly one"):
            getattr(model, call)(**given, **options)
    model = encoder_decoder()
    for given in ({}, {"source_ids": PROMPT, "inputs_embeds": embedded(decoder_only())}):
        with pytest.raises(ArgumentError, match=r"^source_ids, inputs_embeds.*: expected exactly one"):
            getattr(model, call)(**given, **options)


@pytest.mark.parametrize(
    ("vectors", "error"),
    [
        (torch.zeros(3, 5, 15, dtype=torch.float64), ShapeError),
        (torch.zeros(3, 16, dtype=torch.float64), ShapeError),
        (torch.zeros(3, 5, 16, dtype=torch.int64), DtypeError),
        ([[1.0]], ArgumentError),
    ],
)
def test_other_vectors(vectors: object, error: type[Exception]) -> None:
    for call in (decoder_only(), decoder_only().generate, encoder_decoder(), encoder_decoder().generate):
        options = {} if isinstance(call, nn.Module) else {"max_new_tokens": 2}
        with pytest.raises(error, match=r"^inputs_embeds: expected"):
            call(inputs_embeds=vectors, **options)


def test_a_module_without_vectors_is_refused() -> None:
    class Own(nn.Module):
        def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return torch.zeros(*tokens.shape, VOCAB)

    with pytest.raises(ArgumentError, match=r"^inputs_embeds: expected a model that takes inputs_embeds"):
        generate(Own(), inputs_embeds=torch.zeros(1, 2, 3), max_new_tokens=2)
