"""Options of generation that transformers has too: the same tokens and scores, of the same weights."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import StoppingCriteria

from tests.peers.llama import PROMPT, REAL, llama, written_by
from transformer.generation import generate
from transformer.models import DecoderOnlyTransformer

Pair = tuple[DecoderOnlyTransformer, nn.Module]

STOPS = (None, 4, [4, 7])
"""Stop tokens: none, one, and two, with which they take more candidates of a beam search."""


@pytest.fixture(scope="module")
def pair() -> Pair:
    return llama()


def stop_at(stop: int | list[int] | None) -> tuple[dict[str, object], dict[str, object]]:
    """As options of theirs, and of ours."""
    ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
    return {"eos_token_id": stop, "pad_token_id": ids[0] if ids else 0}, {
        "stop_tokens": ids,
        "pad_token": (ids or [0])[0],
    }


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_the_end_of_a_beam_search(pair: Pair, stop: int | list[int] | None, early_stopping: bool | str) -> None:
    ours, theirs = pair
    for row, penalty, beams in product(range(2), (1.0, -1.0, 2.0), (2, 3)):
        given = {
            "max_new_tokens": 7,
            "num_beams": beams,
            "num_return_sequences": 2,
            "length_penalty": penalty,
            "early_stopping": early_stopping,
        }
        at, own = stop_at(stop)
        expected = written_by(theirs, PROMPT[row : row + 1], do_sample=False, **at, **given)
        assert ours.generate(PROMPT[row : row + 1], **own, **given).tolist() == expected.tolist()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.5},
        {"temperature": 1.5, "top_k": 1},
        {"temperature": 0.8, "top_p": 0.3},
        {"temperature": 1.3, "min_p": 0.9, "top_k": 5, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_sampled_beams(pair: Pair, options: dict[str, float], early_stopping: bool | str) -> None:
    """Of equal seeds, all rows and several samples; the filters keep as many tokens as a search needs."""
    ours, theirs = pair
    for seed, stop in product(range(2), STOPS):
        given = {"max_new_tokens": 7, "num_beams": 3, "num_return_sequences": 3, "early_stopping": early_stopping}
        at, own = stop_at(stop)
        torch.manual_seed(seed)
        expected = written_by(theirs, PROMPT, do_sample=True, **at, **given, **{"top_k": 0, **options})
        torch.manual_seed(seed)
        assert ours.generate(PROMPT, **own, **given, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 5},
        {"min_new_tokens": 10},
        {"forced_eos_token_id": 7},
        {"forced_eos_token_id": [7], "min_new_tokens": 2},
        {"forced_bos_token_id": 6},
    ],
    ids=str,
)
def test_forced_and_excluded_tokens(pair: Pair, options: dict[str, object], beams: int) -> None:
    ours, theirs = pair
    at, own = stop_at([4, 12, 6])
    for prompt in (PROMPT, PROMPT[:, :1]):
        given = {"max_new_tokens": 10, "num_beams": beams, **options}
        early = {} if beams == 1 else {"early_stopping": "never"}
        expected = written_by(theirs, prompt, do_sample=False, **at, **given, **early)
        assert ours.generate(prompt, **own, **given).tolist() == expected.tolist()


class EndsWith(StoppingCriteria):
    """A class as users of transformers write it."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return input_ids[:, -1] == 7


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "criteria",
    [[MaxLengthCriteria(8)], StoppingCriteriaList([EosTokenCriteria([4]), MaxLengthCriteria(10)]), [EndsWith()]],
    ids=["length", "list", "own"],
)
def test_stopping_criteria(pair: Pair, criteria: list[StoppingCriteria], beams: int) -> None:
    """Those of transformers, for padded prompts too."""
    ours, theirs = pair
    at, own = stop_at(11)
    for real in (None, REAL):
        prompt = PROMPT if real is None else PROMPT.masked_fill(~REAL, 0)
        given = {"stopping_criteria": StoppingCriteriaList(criteria), "max_new_tokens": 8, "num_beams": beams}
        early = {} if beams == 1 else {"early_stopping": "never"}
        expected = written_by(theirs, prompt, real, do_sample=False, **at, **given, **early)
        assert ours.generate(prompt, real, **own, **given).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("ours_only", "theirs_only", "normalized"),
    [
        ({}, {"do_sample": False}, True),
        ({"temperature": 0.8, "top_k": 5}, {"do_sample": True, "temperature": 0.8, "top_k": 5}, True),
        ({"num_beams": 3}, {"do_sample": False, "num_beams": 3, "early_stopping": "never"}, False),
    ],
    ids=["greedy", "sampled", "beams"],
)
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_transition_scores(
    pair: Pair, ours_only: dict[str, object], theirs_only: dict[str, object], normalized: bool, penalty: float
) -> None:
    """Beams are scored by the numbers that are summed, as the documentation of theirs does it."""
    ours, theirs = pair
    at, own = stop_at(4)
    given = {"max_new_tokens": 7, "repetition_penalty": penalty}
    torch.manual_seed(3)
    found = written_by(theirs, PROMPT, return_dict_in_generate=True, output_scores=True, **at, **given, **theirs_only)
    indices = getattr(found, "beam_indices", None)
    expected = theirs.compute_transition_scores(found.sequences, found.scores, indices, normalize_logits=normalized)
    torch.manual_seed(3)
    out = generate(ours, PROMPT, return_scores=True, **own, **given, **ours_only)
    assert torch.equal(out.tokens, found.sequences[:, PROMPT.shape[1] :])
    real = out.log_probabilities != 0
    torch.testing.assert_close(out.log_probabilities[real], expected[real], rtol=0, atol=1e-5)
    ends = [reason == "stop_token" for reason in out.stop_reasons]
    assert ends == [4 in row for row in out.tokens.tolist()]
    if not normalized:
        torch.testing.assert_close(out.beam_scores, found.sequences_scores, rtol=0, atol=1e-5)
