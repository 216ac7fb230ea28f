"""Processors of transformers and of users, greedy, sampled, in beams and streams: their effect, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding
from transformer.errors import ArgumentError, AttentionError, DtypeError, ShapeError
from transformer.generation import MinP, Processor, RepetitionPenalty, TopK, TopP

MODEL, PROMPT, REAL = decoder_only(), ids(3, 5), padding([(0, 5), (2, 3), (4, 1)], 5)
NEW = {"max_new_tokens": 6}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def streamed(*given: Tensor, **options: object) -> Tensor:
    return torch.stack(list(MODEL.stream(*given, **NEW, **options)), 1)


def generated(*given: Tensor, **options: object) -> Tensor:
    return MODEL.generate(*given, **NEW, **options)[:, given[0].shape[1] :]


WAYS: dict[str, Callable[..., Tensor]] = {
    "greedy": generated,
    "sampling": lambda *given, **options: generated(*given, temperature=1.0, generator=seeded(), **options),
    "beams": lambda *given, **options: generated(*given, num_beams=3, **options),
    "stream": streamed,
    "sampled stream": lambda *given, **options: streamed(*given, temperature=1.0, generator=seeded(), **options),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("real", [None, REAL], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (RepetitionPenaltyLogitsProcessor(1.7), RepetitionPenalty(1.7)),
        (TopKLogitsWarper(3), TopK(3)),
        (TopPLogitsWarper(0.6), TopP(0.6)),
        (LogitsProcessorList([TopKLogitsWarper(4), TopPLogitsWarper(0.8)]), None),
    ],
    ids=["penalty", "top k", "top p", "list"],
)
def test_theirs_do_what_ours_do(theirs: Processor, ours: Processor | None, real: Tensor | None, way: str) -> None:
    given = (PROMPT,) if real is None else (PROMPT, real)
    if isinstance(theirs, LogitsProcessorList):
        expected, processors = WAYS[way](*given, processors=[TopK(4), TopP(0.8)]), theirs
    else:
        expected, processors = WAYS[way](*given, processors=[ours]), [theirs]
    assert torch.equal(WAYS[way](*given, processors=processors), expected)


@pytest.mark.parametrize("way", WAYS)
def test_what_they_forbid_is_not_written(way: str) -> None:
    written = WAYS[way]
    banned = {int(token) for row in written(PROMPT) for token in row}
    kept = {int(t) for row in written(PROMPT, processors=[SuppressTokensLogitsProcessor(list(banned))]) for t in row}
    assert not kept & banned
    bad = NoBadWordsLogitsProcessor([[token] for token in banned], eos_token_id=VOCAB - 1)
    assert not {int(t) for row in written(PROMPT, processors=[bad]) for t in row} & banned - {VOCAB - 1}
    only = PrefixConstrainedLogitsProcessor(lambda _, row: [(int(row[-1]) + 1) % VOCAB], 1)
    if way != "beams":
        out = written(PROMPT, processors=[only])
        assert torch.equal(out[:, 0], (PROMPT[:, -1] + 1) % VOCAB)
        assert torch.equal(out[:, 1:], (out[:, :-1] + 1) % VOCAB)
    pairs = torch.cat((PROMPT, written(PROMPT, processors=[NoRepeatNGramLogitsProcessor(2)])), 1).unfold(1, 2, 1)
    for before, row in zip(PROMPT.unfold(1, 2, 1), pairs, strict=True):
        new = [tuple(pair) for pair in row.tolist()][len(before) :]
        assert len(set(new)) == len(new)


def test_a_temperature_changes_no_greedy_choice() -> None:
    assert torch.equal(generated(PROMPT, processors=[TemperatureLogitsWarper(0.7)]), generated(PROMPT))


def test_a_least_length_over_stop_tokens() -> None:
    stop = int(generated(PROMPT[:1])[0, 0])
    assert generated(PROMPT[:1], stop_tokens=[stop]).shape[1] == 1
    at_least = MinNewTokensLengthLogitsProcessor(5, 4, eos_token_id=stop, device="cpu")
    assert generated(PROMPT[:1], stop_tokens=[stop], processors=[at_least]).shape[1] >= 4


def test_a_target_of_an_encoder_decoder() -> None:
    model, source = encoder_decoder(), ids(2, 4)
    for options in ({}, {"num_beams": 2}):
        plain = model.generate(source, **NEW, **options)
        banned = plain.flatten().unique().tolist()
        out = model.generate(source, **NEW, **options, processors=[SuppressTokensLogitsProcessor(banned)])
        assert not torch.isin(out, torch.tensor(banned)).any()


@pytest.mark.parametrize("way", WAYS)
def test_a_processor_sees_ids_and_scores(way: str) -> None:
    """Ids of the vocabulary, of the row's own tokens alone, and float scores: also where rows are padded."""
    own = [set(row[real].tolist()) for row, real in zip(PROMPT, REAL, strict=True)]
    seen: list[int] = []

    def look(input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.dtype == torch.int64
        assert scores.is_floating_point()
        assert scores.shape == (input_ids.shape[0], VOCAB)
        copies = input_ids.shape[0] // 3
        for row, tokens in enumerate(input_ids.tolist()):
            assert set(tokens[:5]) == own[row // copies]
        seen.append(input_ids.shape[1])
        return scores

    WAYS[way](PROMPT, REAL, processors=[look])
    assert seen == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("way", WAYS)
def test_a_processor_sees_no_token_that_its_row_has_not(way: str) -> None:
    """Rows that end at different steps: after its end a row repeats its first token, and no other id appears."""
    stop, ends = VOCAB - 1, {row: 2 + 2 * row for row in range(3)}
    seen: list[Tensor] = []

    def end(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(input_ids)
        copies = input_ids.shape[0] // 3
        for row in range(input_ids.shape[0]):
            if input_ids.shape[1] - 5 == ends[row // copies]:
                scores[row, :stop] = -torch.inf
            else:
                scores[row, [0, stop]] = -torch.inf
        return scores

    tokens = PROMPT.clamp(min=1)
    WAYS[way](tokens, processors=[end], stop_tokens=[stop])
    assert len(seen) == 6
    copies = seen[-1].shape[0] // 3
    for row, read in enumerate(seen[-1]):
        at = 5 + ends[row // copies] + 1
        assert 0 not in read
        assert (read[at:] == tokens[row // copies, 0]).all()


class Wrong:
    def __init__(self, change: Callable[[Tensor], object]) -> None:
        self.change = change

    def __call__(self, input_ids: Tensor, scores: Tensor) -> object:
        return self.change(scores)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda scores: None, ArgumentError),
        (lambda scores: scores.tolist(), ArgumentError),
        (lambda scores: scores[:, :-1], ShapeError),
        (lambda scores: scores[0], ShapeError),
        (lambda scores: scores[:1], ShapeError),
        (lambda scores: scores.unsqueeze(0), ShapeError),
        (lambda scores: scores > 0, DtypeError),
        (lambda scores: (scores * 10).long(), DtypeError),
        (lambda scores: scores.to("meta"), AttentionError),
        (torch.Tensor.to_sparse, ArgumentError),
    ],
)
def test_what_comes_back_is_looked_at(change: Callable[[Tensor], object], error: type[Exception], way: str) -> None:
    with pytest.raises(error, match=rf"^processors: Wrong: expected float scores \[\d, {VOCAB}\]"):
        WAYS[way](PROMPT, processors=[Wrong(change)])


def test_a_function_is_named_as_well() -> None:
    def backwards(scores: Tensor, input_ids: Tensor) -> Tensor:
        """By the convention of earlier versions: the ids come back, written over; the caller's stay as they are."""
        return scores.fill_(0)

    before = PROMPT.clone()
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(ShapeError, match=r"^processors: backwards: "):
            generated(PROMPT, processors=[backwards], **options)
    assert torch.equal(PROMPT, before)


@pytest.mark.parametrize("way", WAYS)
def test_other_float_dtypes_and_writes_in_place(way: str) -> None:
    """A mask in float16, or scores written over: the model's own logits stay as they are."""
    expected = WAYS[way](PROMPT, processors=[TopK(2)])

    def over(_: Tensor, scores: Tensor) -> Tensor:
        return scores.copy_(TopK(2)(_, scores))

    assert torch.equal(WAYS[way](PROMPT, processors=[over]), expected)
    halves = WAYS[way](PROMPT, processors=[lambda _, scores: MinP(1.0)(_, scores).half()])
    assert torch.equal(halves, WAYS[way](PROMPT, processors=[MinP(1.0)]))
