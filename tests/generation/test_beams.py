"""Beam search, compared with an exhaustive search and with transformers' rule, and row by row."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import fill, padding
from transformer.errors import ArgumentError
from transformer.generation.hypotheses import Continuation, Hypotheses
from transformer.models import DecoderOnlyTransformer

TINY, STOP = 4, 3
WIDE = TINY**3 // 2
"""A vocabulary of which `TINY` tokens may be written: as many beams as it has tokens are enough for every prefix."""


def first_ones(_: Tensor, scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.arange(scores.shape[-1]) >= TINY, -math.inf)


def tiny(seed: int, vocab: int = TINY) -> DecoderOnlyTransformer:
    model = DecoderOnlyTransformer(vocab, 8, 2, 8, 1, tied_embeddings=False)
    fill(model, seed)
    return model.double().eval()


@torch.no_grad()
def every_continuation(
    model: DecoderOnlyTransformer, prompt: Tensor, most: int, penalty: float
) -> list[tuple[float, list[int]]]:
    """All that end with the stop token or after `most` tokens, the best first: each is scored by one forward."""
    found = []
    for length in range(1, most + 1):
        for tokens in product(range(TINY), repeat=length):
            if STOP in tokens[:-1] or (length < most and tokens[-1] != STOP):
                continue
            whole = torch.cat((prompt, torch.tensor(tokens)))
            scores = model(whole[None])[0].log_softmax(-1)[len(prompt) - 1 : -1]
            total = sum(float(row[token]) for row, token in zip(scores, tokens, strict=True))
            found.append((total / length**penalty, list(tokens)))
    return sorted(found, key=lambda scored: -scored[0])


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("penalty", [1.0, 0.0, -0.7, 2.0])
def test_the_best_of_all_continuations(penalty: float, use_cache: bool) -> None:
    """With beams for every prefix nothing is lost: the best continuations come out, in order, of each of two rows."""
    for seed in range(3):
        model, prompt = tiny(seed, WIDE), ids(2, 3, TINY, seed)
        real = padding([(0, 3), (1, 2)], 3)
        out = model.generate(
            prompt,
            real,
            max_new_tokens=4,
            num_beams=WIDE,
            processors=[first_ones],
            num_return_sequences=5,
            length_penalty=penalty,
            stop_tokens=[STOP],
            use_cache=use_cache,
        )[:, 3:]
        for row in range(2):
            best = every_continuation(model, prompt[row, real[row]], 4, penalty)[:5]
            expected = [tokens + [STOP] * (out.shape[1] - len(tokens)) for _, tokens in best]
            assert out[row * 5 : row * 5 + 5].tolist() == expected


def test_more_beams_find_what_greedy_misses() -> None:
    """A token that is second at first, but has a certain continuation, and the most probable first token."""
    steps = {(): [0.6, 0.4, 0.0], (0,): [0.5, 0.5, 0.0], (1,): [0.0, 0.0, 1.0]}

    def follow(tokens: Tensor, _: Tensor) -> Tensor:
        rows = [[p or 1e-9 for p in steps[tuple(row[1:].tolist())]] + [1e-9] for row in tokens]
        return torch.tensor(rows, dtype=torch.float64).log()

    given = {"max_new_tokens": 2, "processors": [follow]}
    assert tiny(0).generate(ids(1, 1, TINY), **given)[0, 1] == 0
    assert tiny(0).generate(ids(1, 1, TINY), num_beams=2, **given)[0, 1:].tolist() == [1, 2]


@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
def test_a_row_searches_alone(build) -> None:
    """Rows that finish at different steps, of different lengths, their limits their own: each as if alone."""
    model, prompt, real = build("mha none"), ids(4, 5), padding([(0, 5), (3, 2), (0, 3), (4, 1)], 5)
    skip = 5 if build is decoder_only else 0
    given = {
        "max_length": 9,
        "num_beams": 3,
        "num_return_sequences": 2,
        "stop_tokens": (1, 2, 4, 6, 8),
        "pad_token": 99,
    }
    together = model.generate(prompt, real, **given)[:, skip:]
    lengths = set()
    for row in range(4):
        own = prompt[row : row + 1, real[row]]
        alone = model.generate(own, **given)[:, own.shape[1] if skip else 0 :]
        lengths.add(alone.shape[1])
        mine = together[2 * row : 2 * row + 2]
        assert torch.equal(mine[:, : alone.shape[1]], alone)
        assert (mine[:, alone.shape[1] :] == 99).all()
    assert len(lengths) > 1


def test_the_conversation_has_read_the_best() -> None:
    """Not what the other candidates were; rows are repeated for several of the best."""
    model = decoder_only().enable_cache()
    first = model.generate(
        ids(2, 4), max_new_tokens=3, num_beams=3, num_return_sequences=2, stop_tokens=(2,), pad_token=2
    )
    turn = ids(4, 2, seed=3)
    written = first[:, 4:]
    real = torch.cat(
        (torch.ones(4, 4).bool(), (written == 2).cumsum(1) - (written == 2).long() == 0, torch.ones(4, 2).bool()), 1
    )
    with torch.no_grad():
        expected = decoder_only()(torch.cat((first, turn), 1), real)
        torch.testing.assert_close(model(turn), expected[:, -2:], rtol=0, atol=1e-10)
    assert torch.equal(model.kv_cache.lengths, real.sum(1))


def test_fewer_continuations_than_were_asked_for() -> None:
    """Four continuations of one token; the last is repeated."""
    given = {"max_new_tokens": 1, "num_beams": 6, "num_return_sequences": 6}
    out = tiny(0, WIDE).generate(ids(1, 2, TINY), processors=[first_ones], **given)[:, 2:]
    assert sorted(out[:4, 0].tolist()) == [0, 1, 2, 3]
    assert torch.equal(out[4:], out[3:4].expand(2, -1))


def test_a_candidate_may_have_no_way_on() -> None:
    """A processor that forbids everything after some token ends that candidate only."""

    def forbid(tokens: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill((tokens[:, -1:] != 1) & (tokens.shape[1] > 2), -math.inf)

    given = {"max_new_tokens": 3, "num_beams": 4, "processors": [forbid]}
    for renormalize in (False, True):
        out = tiny(0).generate(ids(1, 2, TINY), **given, renormalize_logits=renormalize)[0, 2:]
        assert out[:2].tolist() == [1, 1]


@pytest.mark.parametrize("penalty", [-1e6, -3.0, 0.0, 1.0, 1e6, 1e308])
def test_scores_at_any_length_penalty(penalty: float) -> None:
    done = Hypotheses(2, penalty, 5)
    done.add(-1.0, Continuation([0], []), "length")
    done.add(-4.0, Continuation([0, 1], []), "length")
    done.add(-9.0, Continuation([0, 1, 2], []), "length")
    assert len(done.best) == 2
    assert [each.score for each in done.best] == sorted((each.score for each in done.best), reverse=True)
    assert all(math.isfinite(each.score) for each in done.best)


def test_when_a_row_is_closed() -> None:
    """Only where the mildest score that is still possible does not reach the worst of the best."""
    done = Hypotheses(1, 1.0, 10)
    assert not done.is_final(-100.0, 3), "nothing is done yet"
    done.add(-2.0, Continuation([0, 1], []), "length")  # -1 per token
    assert not done.is_final(-9.9, 3), "-0.99 per token with ten of them"
    assert done.is_final(-10.0, 3)
    shorter = Hypotheses(1, -1.0, 10)
    shorter.add(-2.0, Continuation([0, 1], []), "length")  # -4
    assert not shorter.is_final(-1.3, 2), "-3.9 with a third token"
    assert shorter.is_final(-1.4, 2)


def test_when_a_row_is_closed_early() -> None:
    """False looks at the present length, True at nothing else than the number of those that have ended."""
    for early, final in ((False, [False, True]), (True, [True, True]), ("never", [False, False])):
        done = Hypotheses(1, 1.0, 10, early)
        assert not done.is_final(-100.0, 3), "nothing is done yet"
        done.add(-2.0, Continuation([0, 1], []), "stop_token")  # -1 per token
        assert [done.is_final(log_probability, 3) for log_probability in (-2.9, -3.0)] == final


@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
def test_more_beams_than_tokens(build) -> None:
    """Refused, and the conversation is as it was."""
    model = build("mha none").enable_cache()
    model.generate(ids(2, 3), max_new_tokens=2, num_beams=VOCAB)
    length = model.kv_cache.length
    for beams in (VOCAB + 1, 10**9, 2**70):
        with pytest.raises(ArgumentError, match=rf"^num_beams: expected at most {VOCAB}, .*, got {beams}"):
            model.generate(ids(2, 3), max_new_tokens=2, num_beams=beams)
    assert model.kv_cache.length == length
