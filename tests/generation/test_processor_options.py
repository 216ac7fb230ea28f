"""Options that penalise and exclude tokens: greedy, sampled, in beams and streams, of each row, and nothing left."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.generation.test_foreign_processors import MODEL, PROMPT, REAL, WAYS, generated
from tests.models.variants import VOCAB, encoder_decoder, ids
from transformer.errors import ArgumentError, NonFiniteError
from transformer.generation import (
    DRY,
    XTC,
    FrequencyPenalty,
    History,
    HistoryProcessor,
    NoRepeatNGram,
    PresencePenalty,
    RepetitionPenalty,
    SequenceBias,
    TypicalP,
    generate,
)

PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 0.7}
BANS: dict[str, Any] = {"no_repeat_ngram_size": 2, "bad_words_ids": [[1], [2, 3]], "sequence_bias": {(4,): -3.0}}
AS_PROCESSORS = [
    SequenceBias({(4,): -3.0}),
    PresencePenalty(1.5),
    FrequencyPenalty(0.7),
    NoRepeatNGram(2),
    SequenceBias([([1], -math.inf), ([2, 3], -math.inf)]),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("real", [None, REAL], ids=["whole", "padded"])
def test_options_are_their_classes(way: str, real: Tensor | None) -> None:
    given = (PROMPT,) if real is None else (PROMPT, real)
    out = WAYS[way](*given, **PENALTIES, **BANS)
    assert torch.equal(out, WAYS[way](*given, processors=AS_PROCESSORS))
    assert not torch.equal(out, WAYS[way](*given))


@pytest.mark.parametrize("way", [way for way in WAYS if "sampl" not in way])
def test_dry_in_padded_rows_is_that_of_each_row_alone(way: str) -> None:
    """Padding repeats the first token of a row, which is no repetition."""
    rule = DRY(3.0, allowed_length=1)
    out = WAYS[way](PROMPT, REAL, processors=[rule])
    for row in range(3):
        assert torch.equal(WAYS[way](PROMPT[row : row + 1, REAL[row]], processors=[rule])[0], out[row])


def test_a_penalty_counts_new_tokens_alone() -> None:
    """A prompt of the token that is generated costs it nothing; each time that it is generated does."""
    first = int(generated(PROMPT[:1])[0, 0])
    prompt = torch.cat((torch.full((1, 30), first), PROMPT[:1]), 1)
    favoured = {"sequence_bias": {(first,): 50.0}}
    out = generated(prompt, **favoured, frequency_penalty=9.5)
    assert Counter(out[0].tolist())[first] >= 4
    assert out[0, :4].tolist() == [first] * 4
    assert Counter(generated(prompt, **favoured, presence_penalty=200.0)[0].tolist())[first] == 1


def test_the_order_of_transformers() -> None:
    """Options that change scores, forced tokens, processors of the user, sampling."""
    seen: list[Tensor] = []

    def look(_: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    options = {"repetition_penalty": 1.5, "bad_words_ids": [[1]], "min_new_tokens": 1, "stop_tokens": [2]}
    MODEL.generate(PROMPT, max_new_tokens=1, processors=[look], temperature=0.5, top_k=3, **options)
    with torch.no_grad():
        expected = RepetitionPenalty(1.5)(PROMPT, MODEL(PROMPT)[:, -1])
    expected[:, [1, 2]] = -math.inf
    torch.testing.assert_close(seen[0], expected)


def test_values_of_each_row() -> None:
    """A row of a batch is generated with its own options, those of the user's processors among rows of their own."""
    values: dict[str, list[Any]] = {
        "presence_penalty": [0.0, 2.0, 1.0],
        "frequency_penalty": [1.0, None, -0.5],
        "no_repeat_ngram_size": [0, 2, 1],
        "typical_p": [1.0, 0.5, 0.8],
        "seed": [1, 2, 3],
        "temperature": [1.0, 1.5, 0.0],
    }
    out = generated(PROMPT, REAL, **values)
    for row in range(3):
        alone = PROMPT[row : row + 1, REAL[row]]
        own = {name: each[row] for name, each in values.items()}
        assert torch.equal(generated(alone, **own)[0], out[row])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 1.0, "num_return_sequences": 2}])
def test_a_function_of_allowed_tokens_sees_rows_by_their_number(options: dict[str, Any]) -> None:
    """Without padding, with the number of the row that beams belong to, and not after the end of a row."""
    copies, prompt = options.get("num_return_sequences", 1), PROMPT.clamp(min=1)
    seen: set[int] = set()

    def allowed(number: int, tokens: Tensor) -> list[int]:
        own = prompt[number // copies][REAL[number // copies]].tolist()
        assert tokens[: len(own)].tolist() == own
        new = tokens[len(own) :].tolist()
        assert 0 not in new, "the row has ended"
        seen.add(number)
        return [0] if len(new) == 1 + number // copies else [3, 5, 7]

    out = generated(prompt, REAL, prefix_allowed_tokens_fn=allowed, stop_tokens=[0], **options)
    assert [row.index(0) for row in out.tolist()] == [1 + row // copies for row in range(3 * copies)]
    assert seen == set(range(3 * copies))


def test_a_processor_of_histories_knows_the_rows() -> None:
    class Looks(HistoryProcessor):
        def process(self, history: History, scores: Tensor) -> Tensor:
            seen.append((history.row_tokens(), history.new_tokens()))
            return scores

    seen: list[tuple[dict[int, list[int]], dict[int, list[int]]]] = []
    out = MODEL.generate(PROMPT, REAL, processors=[Looks()], max_new_tokens=[2, 6, 6])[:, 5:]
    for step, (rows, new) in enumerate(seen):
        assert rows.keys() == new.keys() == ({0, 1, 2} if step < 2 else {1, 2})
        for row in rows:
            assert new[row] == out[row, :step].tolist()
            assert rows[row] == PROMPT[row, REAL[row]].tolist() + new[row]


def test_a_stop_token_alone_is_no_bad_word() -> None:
    first = int(generated(PROMPT[:1])[0, 0])
    both = {"stop_tokens": [first], "bad_words_ids": [[first], [first + 1 if first < VOCAB - 1 else 0]]}
    assert generated(PROMPT[:1], **both).tolist() == [[first]]
    assert first not in generated(PROMPT[:1], bad_words_ids=[[first]])


@pytest.mark.parametrize("way", WAYS)
def test_options_that_exclude_every_token(way: str) -> None:
    every = [[token] for token in range(VOCAB)]
    message = r"^no_repeat_ngram_size, bad_words_ids, .*: expected at least one token .* got none in rows? \["
    with pytest.raises(NonFiniteError, match=message):
        WAYS[way](PROMPT, bad_words_ids=every)
    with pytest.raises(NonFiniteError, match=r"^processors: expected at least one finite logit per row"):
        WAYS[way](PROMPT, bad_words_ids=every, processors=[RepetitionPenalty(1.1)])
    with pytest.raises(ArgumentError, match=r"bad_words_ids: expected ids below 11"):
        WAYS[way](PROMPT, bad_words_ids=[[VOCAB]])


def test_no_token_is_left_at_a_later_step() -> None:
    """The error names the rows and the step, though the host looks only every few steps."""
    with pytest.raises(NonFiniteError, match=r"got none in rows \[0\] at step 10$"):
        MODEL.generate(PROMPT[:1, :1], max_new_tokens=14, no_repeat_ngram_size=1)


def test_a_conversation_and_an_encoder_decoder() -> None:
    """History is that of the call; the target of an encoder-decoder begins with its start token."""
    model, source = encoder_decoder(), ids(2, 4)
    for options in ({}, {"num_beams": 2}):
        out = model.generate(source, max_new_tokens=6, no_repeat_ngram_size=1, **options)
        assert all(len({*row}) == len(row) for row in out.tolist())
    cached = MODEL.enable_cache()
    try:
        first = cached.generate(PROMPT, max_new_tokens=3, no_repeat_ngram_size=1)
        new = cached.generate(first[:, -1:], max_new_tokens=3, frequency_penalty=100.0)[:, 1:]
        assert all(len({*row}) == 3 for row in new.tolist())
    finally:
        cached.disable_cache()


def test_of_any_module_and_with_scores() -> None:
    out = generate(MODEL, PROMPT, max_new_tokens=5, **BANS, return_scores=True)
    assert torch.equal(out.tokens, generate(MODEL, PROMPT, max_new_tokens=5, **BANS))
    assert out.log_probabilities.isfinite().all()


def test_filters_as_processors() -> None:
    """XTC and the typical filter among the user's processors; a seed of XTC gives the same tokens again."""

    def run(seed: int) -> Tensor:
        rule = XTC(0.5, 0.02, torch.Generator().manual_seed(seed))
        return generated(PROMPT, processors=[TypicalP(0.9), rule])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), generated(PROMPT))
