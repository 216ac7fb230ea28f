"""Ends of rows other than by tokens and text: criteria, time and forced tokens; the reason of each end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from transformer.errors import ArgumentError, DtypeError, ShapeError
from transformer.generation import generate, stops, stream

PROMPT, REAL = ids(3, 5), padding([(0, 5), (2, 3), (0, 2)], 5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_criterion_of_rows(use_cache: bool) -> None:
    """It sees the tokens of each row with the last one, and the scores that this was chosen from."""
    model = decoder_only()
    plain = generate(model, PROMPT, REAL, max_new_tokens=8)

    def third(input_ids: Tensor, scores: Tensor) -> Tensor:
        assert torch.equal(scores.argmax(-1)[1], input_ids[1, -1])
        return torch.tensor([input_ids.shape[1] == 8, False, input_ids.shape[1] == 6])

    given = {"max_new_tokens": 8, "stopping_criteria": [third], "pad_token": 99, "use_cache": use_cache}
    out = generate(model, PROMPT, REAL, return_scores=True, **given)
    assert out.stop_reasons == ["criterion", "length", "criterion"]
    for row, count in enumerate((3, 8, 1)):
        assert torch.equal(out.tokens[row, :count], plain[row, :count])
        assert (out.tokens[row, count:] == 99).all()
    assert torch.equal(torch.stack(list(stream(model, PROMPT, REAL, **given)), 1), out.tokens)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0, "seed": 3}], ids=str)
@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
def test_a_criterion_for_all(build, options: dict[str, object]) -> None:
    """A bool ends all rows; the conversation has read the tokens that were returned."""
    model, prompt = build().enable_cache(), PROMPT if build is decoder_only else ids(3, 5, VOCAB + 2)
    model.generate(prompt, max_new_tokens=2)
    before = model.kv_cache.length if build is decoder_only else 0
    lengths = []

    def fourth(input_ids: Tensor, _: Tensor) -> bool:
        lengths.append(input_ids.shape[1])
        return len(lengths) == 4

    out = model.generate(prompt, max_new_tokens=9, stopping_criteria=[fourth], return_scores=True, **options)
    assert out.log_probabilities.shape[1] == 4
    assert set(out.stop_reasons) == {"criterion"}
    assert lengths == list(range(lengths[0], lengths[0] + 4))
    assert model.kv_cache.length == before + lengths[-1]


def test_a_criterion_is_asked_of_each_candidate() -> None:
    """Beams: those that end with an even token, brute force over all continuations of two tokens."""
    model, vocabulary = decoder_only("mha none"), VOCAB

    def even(input_ids: Tensor, _: Tensor) -> Tensor:
        return (input_ids[:, -1] % 2 == 0) & (input_ids.shape[1] == 6)

    given = {"num_beams": vocabulary, "num_return_sequences": 3, "length_penalty": 0.0, "max_new_tokens": 2}
    out = generate(model, PROMPT[:1], stopping_criteria=[even], pad_token=99, return_scores=True, **given)
    with torch.no_grad():
        first = model(PROMPT[:1])[0, -1].log_softmax(-1)
        found = [(float(first[a]), [a]) for a in range(0, vocabulary, 2)]
        for a in range(1, vocabulary, 2):
            second = model(torch.cat((PROMPT[:1], torch.tensor([[a]])), 1))[0, -1].log_softmax(-1)
            found += [(float(first[a] + second[b]), [a, b]) for b in range(vocabulary)]
    best = sorted(found, reverse=True)[:3]
    assert [[token for token in row if token != 99] for row in out.tokens.tolist()] == [tokens for _, tokens in best]
    assert out.beam_scores.tolist() == pytest.approx([score for score, _ in best], abs=1e-12)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (1, ArgumentError),
        (None, ArgumentError),
        (torch.tensor([1, 0, 1]), DtypeError),
        (torch.tensor([True, False]), ShapeError),
    ],
)
def test_results_that_are_none(given: object, error: type[Exception]) -> None:
    model = decoder_only().enable_cache()
    model.generate(PROMPT, max_new_tokens=2)
    before = kept(model)
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(error, match=r"^stopping_criteria: <lambda>: expected a bool, or bool \[\d+\]"):
            model.generate(PROMPT, max_new_tokens=3, stopping_criteria=[lambda *_: given], **options)
    assert kept(model) == before


class Clock:
    """A clock that goes on by a second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"use_cache": False}, {"stop_tokens": [VOCAB]}, {"max_new_tokens": 60}], ids=str
)
def test_the_token_at_which_the_time_is_over(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the last one: the fourth, as the clock was looked at once at the beginning."""
    clock = Clock()
    monkeypatch.setattr(stops, "monotonic", clock)
    model = decoder_only().enable_cache()
    given = {"max_new_tokens": 40, "max_time": 3.5, "pad_token": 99, **options}
    out = generate(model, PROMPT, REAL, return_scores=True, **given)
    assert out.tokens.shape == (3, 4)
    assert set(out.stop_reasons) == {"time"}
    if "use_cache" not in options:
        assert model.kv_cache.lengths.tolist() == [9, 7, 6]
    if "num_beams" not in options:
        clock.now = 0.0
        streamed = torch.stack(list(stream(decoder_only(), PROMPT, REAL, **given)), 1)
        assert torch.equal(streamed, out.tokens)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 3.0, "seed": 1}], ids=str)
def test_the_last_token_is_forced(options: dict[str, object]) -> None:
    """At the limit of each row, and not where a row ends before."""
    model = decoder_only()
    given = {"max_length": 8, "forced_eos_token_id": 4, "pad_token": 99, **options}
    out = generate(model, PROMPT, REAL, return_scores=True, **given)
    for row, last in enumerate((2, 4, 5)):
        assert out.tokens[row, last] == 4
        assert out.log_probabilities[row, last] == 0.0
        assert (out.tokens[row, last + 1 :] == 99).all()
    one_of = generate(model, PROMPT, max_new_tokens=3, **(given | {"max_length": None, "forced_eos_token_id": (4, 7)}))
    assert set(one_of[:, -1].tolist()) <= {4, 7}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_the_first_token_is_forced(options: dict[str, object]) -> None:
    """After a prompt of a single token, such as the start token of an encoder-decoder."""
    given = {"max_new_tokens": 3, "forced_bos_token_id": 6, **options}
    source = ids(3, 5, VOCAB + 2)
    assert (encoder_decoder().generate(source, **given)[:, 0] == 6).all()
    prompted = encoder_decoder().generate(source, target_ids=ids(3, 2), **given)
    assert torch.equal(
        prompted, encoder_decoder().generate(source, target_ids=ids(3, 2), **(given | {"forced_bos_token_id": None}))
    )
    mixed = generate(decoder_only(), PROMPT, padding([(0, 5), (4, 1), (0, 1)], 5), **given)
    assert (mixed[1:, 0] == 6).all()


def test_stop_tokens_are_excluded_at_first() -> None:
    """Rows of other lengths than a stop allows; a greedy row takes the best of the others."""
    model, stops_of_all = decoder_only(), tuple(range(VOCAB - 1))
    out = generate(model, PROMPT, max_new_tokens=5, min_new_tokens=3, stop_tokens=stops_of_all, pad_token=99)
    assert (out[:, :3] == VOCAB - 1).all()
    with pytest.raises(ArgumentError, match=r"^min_new_tokens: expected a token that does not end a row"):
        generate(model, PROMPT, max_new_tokens=5, min_new_tokens=1, stop_tokens=range(VOCAB))
    assert generate(model, PROMPT, max_new_tokens=2, min_new_tokens=2, stop_tokens=[10**6]).shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("min_new_tokens", {"min_new_tokens": 4}),
        ("min_new_tokens", {"min_new_tokens": -1}),
        ("max_time", {"max_time": 0}),
        ("max_time", {"max_time": float("nan")}),
        ("stopping_criteria", {"stopping_criteria": len}),
        ("stopping_criteria", {"stopping_criteria": [3]}),
        ("early_stopping", {"early_stopping": "always"}),
        ("forced_bos_token_id, forced_eos_token_id", {"forced_bos_token_id": -1}),
        ("forced_bos_token_id, forced_eos_token_id", {"forced_eos_token_id": "x"}),
        ("forced_bos_token_id, forced_eos_token_id", {"forced_eos_token_id": VOCAB}),
    ],
)
def test_refusals(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        generate(decoder_only(), PROMPT, **{"max_new_tokens": 3, **options})


def test_the_first_of_several_reasons() -> None:
    model = decoder_only()
    plain = generate(model, PROMPT[:1], max_new_tokens=4)[0].tolist()
    given = {
        "stop_tokens": plain[-1:],
        "stop_sequences": [plain[-2:]],
        "stopping_criteria": [lambda i, _: i.shape[1] > 8],
    }
    out = generate(model, PROMPT[:1], max_new_tokens=4, return_scores=True, **given)
    assert out.stop_reasons == ["stop_token"]
    del given["stop_tokens"]
    assert generate(model, PROMPT[:1], max_new_tokens=4, return_scores=True, **given).stop_reasons == ["stop_sequence"]
    del given["stop_sequences"]
    assert generate(model, PROMPT[:1], max_new_tokens=4, return_scores=True, **given).stop_reasons == ["length"]
    assert generate(model, PROMPT[:1], max_new_tokens=5, return_scores=True, **given).stop_reasons == ["criterion"]
