"""Habits from other libraries: an error that names the right call, never a wrong result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.integration.doors import DOORS, PLACES, PROMPT, REAL, SOURCE, X, module
from tests.integration.models import all_caches
from tests.models.variants import decoder_only
from transformer.attention.checks import counted_tokens, real_in_every_row
from transformer.errors import ArgumentError, AttentionError


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def refused(model: nn.Module, call: Callable[[], object], *words: str) -> None:
    """A documented type that is also a ValueError or TypeError, with these words, and nothing changed."""
    before = all_caches(model)
    with pytest.raises(AttentionError) as caught:
        call()
    assert isinstance(caught.value, ValueError | TypeError), repr(caught.value)
    for word in words:
        assert word in str(caught.value), f"{word} is not in: {caught.value}"
    assert all_caches(model) == before


# --- expanding_context ------------------------------------------------------------------------------------------------

MODES = [torch.tensor(True), torch.ones(2, 4, 16), np.True_, 0, 1, 1.0, "yes", "", [True], (), object()]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: type(mode).__name__ + str(mode)[:6])
@pytest.mark.parametrize("cached", [False, True])
def test_expanding_context_is_none_true_or_false(mode: Any, cached: bool) -> None:
    attention, stack = module(cached, causal=True), decoder_only().decoder
    attention(X), decoder_only()
    for call in (
        lambda: attention(X, None, mode),
        lambda: attention(X, expanding_context=mode),
        lambda: attention.plan(X, mode),
    ):
        refused(attention, call, "expanding_context")
    for call in (lambda: stack(X, None, mode), lambda: stack.plan(X, mode), lambda: stack.blocks[0](X, None, mode)):
        refused(stack, call, "expanding_context")
    model = decoder_only()
    if cached:
        model.enable_cache()
        model(PROMPT)
    refused(model, lambda: model(PROMPT, None, mode), "expanding_context")
    refused(model, lambda: model(PROMPT, REAL, expanding_context=mode), "expanding_context")


@pytest.mark.parametrize("kind", ["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("cached", [False, True])
def test_with_a_source_it_has_no_effect(kind: str, cached: bool) -> None:
    """An encoder-decoder hands its own on."""
    expected = module(kind=kind)(X, SOURCE)
    for mode in (None, True, False):
        assert_same(module(cached, kind=kind)(X, SOURCE, mode), expected)


@pytest.mark.parametrize("kind", ["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("cached", [False, True])
def test_query_key_value(kind: str, cached: bool) -> None:
    """As nn.MultiheadAttention is called: the values would be passed as expanding_context."""
    attention = module(cached, kind=kind)
    attention(X, SOURCE)
    for key, value in ((X, X), (SOURCE, SOURCE), (SOURCE, 2 * SOURCE)):
        refused(attention, lambda k=key, v=value: attention(X, k, v), "expanding_context", "kv")
    refused(attention, lambda: attention(X, None, X), "expanding_context")
    for mode in MODES:
        refused(attention, lambda mode=mode: attention(X, SOURCE, mode), "expanding_context")


# --- what is no tensor ------------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda tensor: tensor.tolist(),
    "array": lambda tensor: tensor.numpy(),
    "list of tensors": lambda tensor: list(tensor),
    "number": lambda _: 3,
}


def word_of(argument: str) -> str:
    """The word that an error must contain; for a mask, the name of the mask that the module refuses."""
    return "mask" if "mask" in argument else argument


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), PLACES)
@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_tensor(name: str, argument: str, other: str) -> None:
    make, given, call = DOORS[name]
    model = make()
    call(model, **given)
    wrong = {**given, argument: OTHERS[other](given[argument])}
    refused(model, lambda: call(model, **wrong), word_of(argument))


OPTIONAL = ("kv", "source", "source_ids", "target_ids", "attn_bias", "token_type_ids")
REQUIRED = [(n, a) for n, a in PLACES if "mask" not in a and a not in OPTIONAL]


@pytest.mark.parametrize(("name", "argument"), [*REQUIRED, ("encoder-decoder, generate", "source_ids")])
def test_none_where_a_tensor_is_needed(name: str, argument: str) -> None:
    make, given, call = DOORS[name]
    model = make()
    call(model, **given)
    refused(model, lambda: call(model, **{**given, argument: None}), argument)


# --- masks of the inverted kind ---------------------------------------------------------------------------------------

FLOATS: dict[str, Callable[[Tensor], Tensor]] = {
    "0 for real, -inf for padding": lambda real: torch.zeros(real.shape).masked_fill(~real, -torch.inf),
    "0 for real, the least number for padding": lambda real: torch.zeros(real.shape, dtype=torch.float64).masked_fill(
        ~real, torch.finfo(torch.float64).min
    ),
    "1 for real, as a float": lambda real: real.float(),
    "1 for real, as a half": lambda real: real.half(),
    "complex": lambda real: real.to(torch.complex64),
}

MASKED = [(name, argument) for name, argument in PLACES if "mask" in argument]


@pytest.mark.parametrize(("name", "argument"), MASKED)
@pytest.mark.parametrize("kind", FLOATS)
def test_float_masks(name: str, argument: str, kind: str) -> None:
    """Of other libraries: there 0 is real. The sentence says what is expected here."""
    make, given, call = DOORS[name]
    model = make()
    call(model, **given)
    wrong = {**given, argument: FLOATS[kind](given[argument])}
    refused(model, lambda: call(model, **wrong), word_of(argument), "bool")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), MASKED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_masks_of_whole_numbers_are_taken(name: str, argument: str, dtype: torch.dtype) -> None:
    make, given, call = DOORS[name]
    expected = call(make(), **given)
    result = call(make(), **{**given, argument: given[argument].to(dtype)})
    if isinstance(expected, Tensor) and name != "encoder":
        assert_same(result, expected)


INTEGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "0 for real, -10000 for padding": lambda real: -10000 * (~real).long(),
    "segments": lambda real: real.to(torch.uint8) * 2,
    "segments from 1": lambda real: 1 + real.int(),
    "-1 for real": lambda real: -real.long(),
}


@pytest.mark.parametrize(("name", "argument"), MASKED)
@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_other_than_0_and_1(name: str, argument: str, kind: str) -> None:
    """An inverted mask, or one of segments, would be read as "all are real"."""
    make, given, call = DOORS[name]
    model = make()
    call(model, **given)
    wrong = {**given, argument: INTEGERS[kind](given[argument])}
    refused(model, lambda: call(model, **wrong), word_of(argument), "integers 1 for real tokens and 0 for padding")


class OnDevice(Tensor):
    """A mask that counts how often the host asks for its numbers."""

    is_cpu = False
    looks = 0

    def cpu(self) -> Tensor:  # type: ignore[override]
        OnDevice.looks += 1
        return self.as_subclass(Tensor)


def test_integers_on_a_device_cost_no_second_look() -> None:
    mask = REAL.long().as_subclass(OnDevice)
    OnDevice.looks = 0
    tokens = counted_tokens(X, mask)
    assert (OnDevice.looks, tokens.new_lengths) == (1, (4, 3))
    for check in (lambda m: counted_tokens(X, m), lambda m: real_in_every_row("attention_mask", m, 2, 4, X.device)):
        with pytest.raises(ArgumentError, match=r"^attention_mask: expected bool, or integers"):
            check((2 * REAL.long()).as_subclass(OnDevice))
