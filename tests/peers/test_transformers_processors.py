"""Options that penalise, exclude and filter tokens: the tokens of transformers' generate with the same options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from tests.peers.llama import PROMPT, REAL, VOCAB, llama, written_by
from transformer.generation import DRY, XTC, FrequencyPenalty, Processor
from transformer.models import DecoderOnlyTransformer


@pytest.fixture(scope="module")
def pair() -> tuple[DecoderOnlyTransformer, nn.Module]:
    return llama()


LONG = PROMPT.repeat(1, 2)
"""Prompts that repeat themselves, so that penalties and bans have an effect from the first token on."""


def allowed(number: int, tokens: Tensor) -> list[int]:
    """Half of the ids, by the last token and the number of the row."""
    return [token for token in range(VOCAB) if (token + int(tokens[-1]) + number) % 2]


OPTIONS: dict[str, dict[str, object]] = {
    "sequences": {"no_repeat_ngram_size": 2},
    "tokens": {"no_repeat_ngram_size": 1},
    "words": {"bad_words_ids": [[3], [5, 7], [1, 2, 3], [11]]},
    "biases": {"sequence_bias": [[[4], 2.0], [[9], -1.5], [[2, 6], 5.0], [[6, 6], -9.0]]},
    "allowed": {"prefix_allowed_tokens_fn": allowed},
    "all": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[3], [5, 7]],
        "sequence_bias": [[[4], 2.0], [[2, 6], 5.0]],
        "prefix_allowed_tokens_fn": allowed,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy(pair: tuple[DecoderOnlyTransformer, nn.Module], options: dict[str, object]) -> None:
    ours, theirs = pair
    new = 3 if options.get("no_repeat_ngram_size") == 1 else 10
    prompt = LONG[:, :5] if new == 3 else LONG
    expected = written_by(theirs, prompt, max_new_tokens=new, do_sample=False, **options)
    assert torch.equal(ours.generate(prompt, max_new_tokens=new, **options), expected)
    assert not torch.equal(ours.generate(prompt, max_new_tokens=new), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_padded_row_is_alone(pair: tuple[DecoderOnlyTransformer, nn.Module], options: dict[str, object]) -> None:
    """Theirs of each row without its padding: padding is no token of a row, and completes nothing."""
    ours, theirs = pair
    if "prefix_allowed_tokens_fn" in options:
        options = options | {"prefix_allowed_tokens_fn": lambda _, tokens: allowed(0, tokens)}
    new = 3 if options.get("no_repeat_ngram_size") == 1 else 8
    for beams in (1, 2):
        both = {"max_new_tokens": new, "num_beams": beams, **options}
        out = ours.generate(PROMPT, REAL, **both)[:, 5:]
        for row in range(3):
            alone = PROMPT[row : row + 1, REAL[row]]
            expected = written_by(theirs, alone, do_sample=False, early_stopping="never", **both)
            assert out[row].tolist() == expected[0, alone.shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_beams(pair: tuple[DecoderOnlyTransformer, nn.Module], options: dict[str, object]) -> None:
    ours, theirs = pair
    new = 3 if options.get("no_repeat_ngram_size") == 1 else 7
    for beams, best in ((2, 1), (3, 3)):
        given = {"max_new_tokens": new, "num_beams": beams, "num_return_sequences": best, **options}
        expected = written_by(theirs, PROMPT, early_stopping="never", do_sample=False, **given)
        assert ours.generate(PROMPT, **given).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.5, "typical_p": 0.6},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.8},
        {"temperature": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[2], [0, 6]]},
        {"temperature": 1.2, "typical_p": 0.9, "sequence_bias": [[[4], 2.0]], "prefix_allowed_tokens_fn": allowed},
    ],
)
def test_sampling_with_equal_seeds(pair: tuple[DecoderOnlyTransformer, nn.Module], options: dict[str, object]) -> None:
    ours, theirs = pair
    for copies in (1, 2):
        given = {"max_new_tokens": 10, "num_return_sequences": copies, **options}
        torch.manual_seed(5)
        expected = written_by(theirs, PROMPT, do_sample=True, **{"top_k": 0, **given})
        torch.manual_seed(5)
        assert torch.equal(ours.generate(PROMPT, **given), expected)
        plain = {name: given[name] for name in ("max_new_tokens", "num_return_sequences")}
        torch.manual_seed(5)
        assert not torch.equal(ours.generate(PROMPT, temperature=options["temperature"], **plain), expected)


@pytest.mark.parametrize("processor", [DRY(2.0, allowed_length=1), XTC(1.0, 0.05), FrequencyPenalty(0.3)], ids=repr)
def test_ours_in_their_generate(pair: tuple[DecoderOnlyTransformer, nn.Module], processor: Processor) -> None:
    """Our classes are logits processors of theirs; there all tokens of the row count as new."""
    ours, theirs = pair

    def of_ids(input_ids: Tensor, scores: Tensor) -> Tensor:
        return processor(input_ids, scores)

    processors = LogitsProcessorList([processor])
    expected = written_by(theirs, LONG, max_new_tokens=9, do_sample=False, logits_processor=processors)
    assert torch.equal(ours.generate(LONG, max_new_tokens=9, processors=[of_ids]), expected)
    assert not torch.equal(ours.generate(LONG, max_new_tokens=9), expected)
