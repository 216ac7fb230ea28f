"""Token ids: invalid ones are refused before anything is read, and ids at padding are ignored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.models.variants import SHAPE, VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from transformer.attention import plan_without_cache
from transformer.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from transformer.models import EncoderDecoderTransformer, EncoderTransformer
from transformer.models.tokens import InputPositions, LanguageHead, TokenEmbedding

OUTSIDE = (-1, VOCAB, 2**63 - 1, -(2**63))


def calls(cached: bool) -> list[tuple[nn.Module, str, Callable[[Tensor], object]]]:
    """Every way in for ids, each with a conversation under way where `cached`."""
    decoder, both = decoder_only(), encoder_decoder()
    if cached:
        decoder.enable_cache()
        both.enable_cache()
        with torch.no_grad():
            decoder(ids(2, 3))
            both(ids(2, 3), ids(2, 2))
    return [
        (decoder, "input_ids", decoder),
        (decoder, "input_ids", lambda given: decoder.generate(given, max_new_tokens=2)),
        (decoder, "input_ids", lambda given: decoder.stream(given, max_new_tokens=2)),
        (decoder, "input_ids", lambda given: decoder.generate(given, max_new_tokens=2, num_beams=2)),
        (both, "target_ids", lambda given: both(ids(2, 3), given)),
        (both, "source_ids", lambda given: both(given, ids(2, 2))),
        (both, "source_ids", lambda given: both.generate(given, max_new_tokens=2)),
        (both, "source_ids", lambda given: both.stream(given, max_new_tokens=2)),
    ]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("outside", [*OUTSIDE, VOCAB + 2])
def test_ids_outside_the_vocabulary(outside: int, cached: bool) -> None:
    wrong = ids(2, 3)
    wrong[1, 2] = outside
    for model, name, call in calls(cached):
        if name == "source_ids" and outside == VOCAB:
            continue  # Sources have two tokens more.
        before = kept(model)
        with torch.no_grad(), pytest.raises(ArgumentError, match=rf"^{name}: expected token ids from 0 to"):
            call(wrong)
        assert kept(model) == before


def test_ids_that_are_none() -> None:
    for model, name, call in calls(True):
        before = kept(model)
        for error, given in (
            (ShapeError, ids(2, 3)[0]),
            (DtypeError, ids(2, 3).double()),
            (DtypeError, ids(2, 3) > 2),
        ):
            with torch.no_grad(), pytest.raises(error, match=rf"^{name}"):
                call(given)
        assert kept(model) == before


def test_empty_prompts_and_sources() -> None:
    for given in (ids(2, 0), ids(0, 2)):
        for model in (decoder_only(), encoder_decoder()):
            for call in (model.generate, model.stream):
                with pytest.raises(ShapeError, match=r"_ids: expected .*at least one row and one token"):
                    call(given, max_new_tokens=2)
    for model in (decoder_only(), encoder_decoder()):
        for call in (model.generate, model.stream):
            with pytest.raises(ArgumentError, match=r"_mask: expected at least one real token in every row"):
                call(ids(2, 3), padding([(0, 3), (0, 0)], 3), max_new_tokens=2)


def test_masks_that_do_not_fit_are_named() -> None:
    both = encoder_decoder()
    with pytest.raises(ShapeError, match=r"source_mask: expected \[2, 3\]"):
        both.generate(ids(2, 3), torch.ones(2, 4), max_new_tokens=1)
    with pytest.raises(ShapeError, match=r"^target_mask: expected \[2, 2\]"):
        both(ids(2, 3), ids(2, 2), None, torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"^source_mask: expected \[2, 3\]"):
        both(ids(2, 3), ids(2, 2), torch.ones(2, 2))
    states = both(ids(2, 3))
    with pytest.raises(ShapeError, match=r"^source_mask: expected \[2, 3\]"):
        both(None, ids(2, 2), torch.ones(2, 2), encoder_hidden_states=states)
    of_vectors = EncoderDecoderTransformer(None, VOCAB, **SHAPE).double()
    with pytest.raises(ShapeError, match=r"^source_mask: expected \[2, 3\]"):
        of_vectors(states, ids(2, 2), torch.ones(2, 2))
    with pytest.raises(DeviceError, match=r"^attention_mask: "):
        decoder_only()(ids(2, 3), torch.ones(2, 3, dtype=torch.bool, device="meta"))
    with pytest.raises(ShapeError, match=r"^attention_mask: "):
        EncoderTransformer(VOCAB, **SHAPE)(ids(2, 3), torch.ones(2, 4))


@torch.no_grad()
def test_what_stands_at_padding_does_not_matter() -> None:
    """Not even ids outside the vocabulary."""
    real, tokens = padding([(0, 4), (1, 2)], 4), ids(2, 4)
    other = tokens.masked_fill(~real, -100)
    decoder, both = decoder_only(), encoder_decoder()
    assert torch.equal(decoder(tokens, real)[real], decoder(other, real)[real])
    for chunk in (None, 1):
        written = [
            decoder.generate(each, real, max_new_tokens=3, prefill_chunk_size=chunk)[:, 4:] for each in (tokens, other)
        ]
        assert torch.equal(*written)
    assert torch.equal(both(tokens, tokens, real, real)[real], both(other, other, real, real)[real])


def test_int32_ids_are_ids() -> None:
    model = decoder_only()
    assert torch.equal(model(ids(1, 3).int()), model(ids(1, 3)))


def test_sources_may_be_vectors() -> None:
    model = EncoderDecoderTransformer(None, VOCAB, 16, 4, 20, 2).double().eval()
    vectors = torch.randn(2, 3, 16, dtype=torch.float64)
    whole = model(vectors, ids(2, 4))
    model.enable_cache()
    with torch.no_grad():
        parts = [model(vectors, part) for part in ids(2, 4).split(1, 1)]
    assert_same(torch.cat(parts, 1), whole.detach())
    assert model.generate(vectors, max_new_tokens=3).shape == (2, 3)
    for wrong in (vectors[0], vectors[..., :8]):
        with pytest.raises(ShapeError, match=r"^source_ids: expected vectors \[B, S, 16\]"):
            model.generate(wrong, max_new_tokens=3)


def test_embedding_head_and_dropout() -> None:
    embedding = TokenEmbedding(5, 4, scale=3.0)
    assert torch.equal(embedding(torch.tensor([[2]]))[0, 0], embedding.tokens.weight[2] * 3.0)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        rounded = TokenEmbedding(5, 4, scale=3072**0.5).to(dtype)
        factor = torch.tensor(3072**0.5, dtype=dtype)
        assert torch.equal(rounded(torch.tensor([[2]]))[0, 0], rounded.tokens.weight[2] * factor)
    head = LanguageHead(4, 5, tied=embedding, scale=2.0, softcap=1.5)
    states = torch.randn(1, 2, 4)
    expected = 1.5 * torch.tanh(states @ embedding.tokens.weight.T * 2.0 / 1.5)
    torch.testing.assert_close(head(states), expected)
    assert head.proj.weight is embedding.tokens.weight
    entrance, ones = InputPositions(None, 0.5), torch.ones(1, 50, 4)
    assert (entrance(ones, None) == 0).any()
    assert torch.equal(entrance.eval()(ones, None), ones)


def test_dropout_of_the_input() -> None:
    """Without effect in `eval()`; its own mode and its hooks count."""
    positions = InputPositions(None, 0.5).eval()
    x, step, seen = torch.ones(1, 3, 8), plan_without_cache(torch.ones(1, 3, 8)), []
    assert torch.equal(positions(x, step), x)
    positions.dropout.train()
    assert (positions(x, step) == 0).any()
    positions.eval().dropout.register_forward_hook(lambda *_: seen.append(1))
    positions(x, step)
    assert seen == [1]
