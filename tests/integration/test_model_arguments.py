"""Arguments of the models' forwards: number of logits, one source in one of two forms, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.integration.models import all_caches
from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding, tokens
from transformer.errors import ArgumentError, AttentionError

PROMPT, SOURCE, TURN = ids(2, 4), ids(2, 5, VOCAB + 2), ids(2, 3, seed=5)
REAL, SOURCE_REAL = padding([(0, 4), (1, 3)], 4), padding([(0, 5), (0, 3)], 5)

CALLS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor]]] = {
    "decoder": (decoder_only, lambda model, **named: model(PROMPT, **named)),
    "decoder, padded": (decoder_only, lambda model, **named: model(PROMPT, REAL, **named)),
    "encoder-decoder": (encoder_decoder, lambda model, **named: model(SOURCE, PROMPT, SOURCE_REAL, **named)),
    "encoder-decoder, padded": (encoder_decoder, lambda model, **named: model(SOURCE, PROMPT, None, REAL, **named)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cached", [False, True])
def test_logits_to_keep(name: str, cached: bool) -> None:
    """0: all, n: the last n columns; what caches keep is the same."""
    build, call = CALLS[name]
    with torch.no_grad():
        everything = call(build())
        for count in (0, 1, 2, 4):
            model = build()
            if cached:
                model.enable_cache()
            kept = call(model, logits_to_keep=count)
            assert_same(kept, everything[:, -count:])
            assert kept.shape == (2, count or 4, VOCAB)
            if cached:
                assert model.kv_cache.length == 4


def test_logits_to_keep_has_gradients() -> None:
    model = decoder_only().train()
    model(PROMPT, logits_to_keep=2).sum().backward()
    kept = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(PROMPT)[:, -2:].sum().backward()
    assert_same(kept, [p.grad for p in model.parameters()])


def refused(model: nn.Module, call: Callable[[], object], *names: str) -> None:
    """A documented type that is also a ValueError or TypeError, every argument named, and nothing changed."""
    before = all_caches(model)
    with pytest.raises(AttentionError) as caught:
        call()
    assert isinstance(caught.value, ValueError | TypeError), caught.value
    assert all(name in str(caught.value) for name in names), caught.value
    assert all_caches(model) == before


@pytest.mark.parametrize("count", [-1, 1.5, True, False, "1", None, torch.tensor(1), [0]], ids=repr)
@pytest.mark.parametrize("name", ["decoder", "encoder-decoder"])
def test_other_values_of_logits_to_keep_are_refused(name: str, count: Any) -> None:
    build, call = CALLS[name]
    model = build().enable_cache()
    with torch.no_grad():
        call(model)
        refused(model, lambda: call(model, logits_to_keep=count), "logits_to_keep")


# --- one source, in one of two forms ----------------------------------------------------------------------------------


@torch.no_grad()
def test_without_targets_the_states_of_the_encoder_come() -> None:
    model = encoder_decoder()
    states = model(SOURCE, source_mask=SOURCE_REAL)
    assert states.shape == (2, 5, 16)
    assert_same(states[SOURCE_REAL], model.encode(SOURCE, SOURCE_REAL)[SOURCE_REAL])
    assert_same(model(source_ids=SOURCE), model.encode(SOURCE))


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, SOURCE_REAL], ids=["whole", "masked"])
@pytest.mark.parametrize("cached", [False, True])
def test_states_instead_of_ids(mask: Tensor | None, cached: bool) -> None:
    """What was encoded once is read by every step."""
    model, plain = encoder_decoder(), encoder_decoder()
    expected = plain(SOURCE, torch.cat((PROMPT, TURN), 1), mask)
    if cached:
        model.enable_cache()
    states = model(SOURCE, source_mask=mask)
    first = model(target_ids=PROMPT, source_mask=mask, encoder_hidden_states=states)
    assert_same(first, expected[:, :4])
    turn = TURN if cached else torch.cat((PROMPT, TURN), 1)
    last = model(None, turn, mask, encoder_hidden_states=states, logits_to_keep=1)
    assert_same(last, expected[:, -1:])


@torch.no_grad()
def test_states_without_the_encoder_running() -> None:
    model = encoder_decoder()
    states = model(SOURCE)
    model.encoder.register_forward_hook(lambda *_: pytest.fail("the source was encoded again"))
    model(target_ids=PROMPT, encoder_hidden_states=states)


STATES = tokens(2, 5, 16)

WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "neither": ({"target_ids": PROMPT}, ("source_ids", "encoder_hidden_states")),
    "nothing at all": ({}, ("source_ids", "encoder_hidden_states")),
    "both": (
        {"source_ids": SOURCE, "target_ids": PROMPT, "encoder_hidden_states": STATES},
        ("source_ids", "encoder_hidden_states"),
    ),
    "states of another width": (
        {"target_ids": PROMPT, "encoder_hidden_states": tokens(2, 5, 17)},
        ("encoder_hidden_states",),
    ),
    "states of another rank": (
        {"target_ids": PROMPT, "encoder_hidden_states": tokens(2, 16)},
        ("encoder_hidden_states",),
    ),
    "states of another dtype": (
        {"target_ids": PROMPT, "encoder_hidden_states": STATES.float()},
        (),
    ),
    "ids as states": ({"target_ids": PROMPT, "encoder_hidden_states": SOURCE}, ("encoder_hidden_states",)),
    "states of another batch": ({"target_ids": PROMPT, "encoder_hidden_states": tokens(3, 5, 16)}, ()),
    "states as a list": ({"target_ids": PROMPT, "encoder_hidden_states": STATES.tolist()}, ("encoder_hidden_states",)),
    "a source mask of another length": (
        {"target_ids": PROMPT, "encoder_hidden_states": STATES, "source_mask": REAL},
        ("mask",),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    given, names = WRONG[name]
    model = encoder_decoder().enable_cache()
    model(SOURCE, PROMPT)
    refused(model, lambda: model(**given), *names)


@torch.no_grad()
def test_both_of_the_two_is_an_argument_error() -> None:
    with pytest.raises(ArgumentError, match="one"):
        encoder_decoder()(SOURCE, PROMPT, encoder_hidden_states=STATES)
