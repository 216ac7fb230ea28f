"""Options of generation: a value works or is refused by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from transformer.errors import ArgumentError, AttentionError
from transformer.generation import GenerationOptions, History
from transformer.generation.choice import Choice
from transformer.generation.processors import processed
from transformer.generation.prompt import Prompt
from transformer.generation.rows import rows_of
from transformer.generation.stops import stop_reason

MODEL, PROMPT = decoder_only(dtype=torch.float32), ids(2, 3)
NUMBERS = st.one_of(st.floats(), st.integers(-3, 40))
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty")
COUNTS = ("top_k", "num_beams", "num_return_sequences")


@settings(max_examples=60)
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys((*FLOATS, "top_k", "num_beams", "num_return_sequences"), NUMBERS))
)
def test_tokens_or_a_refusal(options: dict[str, object]) -> None:
    """Never another error, and never a token outside the vocabulary."""
    given = {"max_new_tokens": 2, "stop_tokens": (3,), **options}
    refused = None
    try:
        GenerationOptions(**given)
    except ArgumentError as error:
        refused = str(error)
    if refused is not None:
        assert refused.startswith(tuple(options)), refused
        return
    if given.get("num_beams", 1) > VOCAB:
        with pytest.raises(ArgumentError, match=r"^num_beams: expected at most"):
            MODEL.generate(PROMPT, **given)
        return
    out = MODEL.generate(PROMPT, **given)
    assert ((out >= 0) & (out < VOCAB)).all()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", True])
def test_numbers_that_are_none(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name}: expected a finite number"):
        GenerationOptions(max_new_tokens=1, **{name: value})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("max_new_tokens, max_length", {"max_new_tokens": None}),
        ("max_new_tokens, max_length", {"max_length": 3}),
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("max_length", {"max_new_tokens": None, "max_length": -1}),
        ("num_beams", {"num_beams": 1.0}),
        ("num_return_sequences", {"num_return_sequences": 0}),
        ("num_return_sequences", {"num_return_sequences": 3, "num_beams": 2}),
        ("prefill_chunk_size", {"prefill_chunk_size": 0}),
        ("temperature", {"temperature": -1.0}),
        ("top_k", {"top_k": -1}),
        ("top_k", {"top_k": False}),
        ("top_p", {"top_p": 1.01}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 0}),
        ("min_p", {"min_p": -1e-9}),
        ("repetition_penalty", {"repetition_penalty": -1.0}),
        ("typical_p", {"typical_p": 0}),
        ("typical_p", {"typical_p": [0.5, 1.1]}),
        ("presence_penalty", {"presence_penalty": "1"}),
        ("frequency_penalty", {"frequency_penalty": math.nan}),
        ("no_repeat_ngram_size", {"no_repeat_ngram_size": -1}),
        ("no_repeat_ngram_size", {"no_repeat_ngram_size": 2.0}),
        ("sequence_bias", {"sequence_bias": [[[1], "2"]]}),
        ("sequence_bias", {"sequence_bias": 3}),
        ("bad_words_ids", {"bad_words_ids": [3]}),
        ("bad_words_ids", {"bad_words_ids": [[]]}),
        ("bad_words_ids", {"bad_words_ids": {3}}),
        ("prefix_allowed_tokens_fn", {"prefix_allowed_tokens_fn": [3]}),
        ("temperature", {"temperature": False}),
        ("use_cache", {"use_cache": "always"}),
        ("processors", {"processors": [3]}),
        ("processors", {"processors": len}),
        ("stop_tokens", {"stop_tokens": 3}),
        ("stop_tokens", {"stop_tokens": [-1]}),
        ("stop_tokens", {"pad_token": 1.5}),
        ("stop_sequences", {"stop_sequences": [[]]}),
        ("stop_sequences", {"stop_sequences": [[1, -2]]}),
        ("generator", {"generator": 3}),
    ],
)
def test_refusals_name_the_option(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name}"):
        GenerationOptions(**{"max_new_tokens": 1, **options})


def choice_of(**options: object) -> Choice:
    given = GenerationOptions(max_new_tokens=1, **options)
    return Choice(rows_of(given, Prompt.of(torch.tensor([[1]]), None)), torch.device("cpu"))


def test_any_temperature_above_zero_samples() -> None:
    logits = torch.zeros(1, 4)
    taken = {
        int(choice_of(temperature=t, generator=torch.Generator().manual_seed(seed)).take(logits))
        for t in (1e-300, 1.0)
        for seed in range(20)
    }
    assert len(taken) > 1
    assert int(choice_of().take(logits)) == 0


def test_limits_of_rows() -> None:
    assert GenerationOptions(max_new_tokens=4).limits([1, 7]) == [4, 4]
    assert GenerationOptions(max_length=8).limits([1, 7]) == [7, 1]
    with pytest.raises(ArgumentError, match=r"^max_length: expected more than the 8 tokens"):
        GenerationOptions(max_length=8).limits([1, 8])


def test_ends() -> None:
    options = GenerationOptions(max_new_tokens=4, stop_tokens=[4], stop_sequences=[[1, 2]])
    (row,) = rows_of(options, Prompt.of(torch.tensor([[1]]), None))
    reasons = [
        stop_reason(row, written) for written in ([4], [1, 2], [4, 1], [2], [1, 2, 3], [1, 2, 3, 3], [1, 1, 2, 4])
    ]
    assert reasons == ["stop_token", "stop_sequence", None, None, None, "length", "stop_token"]
    assert options.padding == 4
    assert GenerationOptions(max_new_tokens=1, pad_token=7).padding == 7


@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_zero_is_off(zero: float) -> None:
    """As in llama.cpp and vLLM. Of `top_k` it is a whole number."""
    off = GenerationOptions(max_new_tokens=1, temperature=1.0, top_k=0, top_p=1, min_p=zero, repetition_penalty=zero)
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).double() * 30
    (row,) = off.rows(1)
    out = processed([*row.scoring, *row.sampling()], History(torch.zeros(3, 4, dtype=torch.int64)), logits)
    torch.testing.assert_close(out.softmax(-1), logits.softmax(-1), rtol=0, atol=1e-15)
    assert out.isfinite().all()
    greedy = {"max_new_tokens": 3, "temperature": zero}
    assert torch.equal(MODEL.generate(PROMPT, **greedy), MODEL.generate(PROMPT, max_new_tokens=3))


ODD = (None, 0, -1, 10**30, -(10**30), math.nan, math.inf, -math.inf, 1e308, 1e-320, "x", b"1", [1], (1,), {}, True, 1j)
ODD_ARRAYS = (np.int64(3), np.float32(0.5), np.array([1, 2]), torch.tensor(2), torch.tensor([1, 2]), object())


@pytest.mark.slow
@pytest.mark.parametrize("beside", [{}, {"temperature": 1.0}, {"num_beams": 2}], ids=str)
def test_values_of_any_kind_have_a_meaning_or_a_typed_error(beside: dict[str, object]) -> None:
    """For any value of an option, `generate` and `stream` work, or raise an error with the option."""
    for model in (decoder_only(), encoder_decoder()):
        for option in (field.name for field in dataclasses.fields(GenerationOptions)):
            for value in (*ODD, *ODD_ARRAYS):
                if option.startswith("max_") and type(value) is int and value > 0:
                    continue  # so many tokens were asked for
                given = {"max_new_tokens": 2, **beside, option: value}
                named = (option, *beside)
                for run in (model.generate, lambda *a, model=model, **o: list(model.stream(*a, **o))):
                    error = raised(run, given)
                    assert error is None or (isinstance(error, AttentionError) and named_in(error, named)), given


def raised(run: Callable[..., object], options: dict[str, object]) -> Exception | None:
    try:
        run(torch.tensor([[1, 2, 3]]), **options)
    except Exception as error:
        return error
    return None


def named_in(error: Exception, options: tuple[str, ...]) -> bool:
    return any(option in str(error) for option in options)
