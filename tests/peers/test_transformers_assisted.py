"""Assisted generation and prompt lookup of transformers: the same greedy tokens, of the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.peers.llama import PROMPT, REAL, llama, written_by
from transformer.models import DecoderOnlyTransformer

NEW = 24


def noisy(model: nn.Module, amount: float) -> nn.Module:
    """The model with other weights, so that its guesses are not always right; equal in ours and in theirs."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        weight = next(p for name, p in model.named_parameters() if name in ("lm_head.weight", "head.proj.weight"))
        weight.add_(amount * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def models() -> tuple[DecoderOnlyTransformer, nn.Module, DecoderOnlyTransformer, nn.Module]:
    ours, theirs = llama()
    small, their_small = llama()
    return ours, theirs, noisy(small, 0.3), noisy(their_small, 0.3)


@pytest.mark.parametrize("row", range(3))
def test_an_assistant(models, row: int) -> None:
    ours, theirs, small, their_small = models
    prompt = PROMPT[row : row + 1, REAL[row]]
    for options in ({}, {"repetition_penalty": 1.4}):
        expected = written_by(
            theirs, prompt, do_sample=False, max_new_tokens=NEW, assistant_model=their_small, **options
        )
        given = {"max_new_tokens": NEW, "return_scores": True, **options}
        result = ours.generate(prompt, assistant_model=small, **given)
        assert result.tokens.tolist() == expected.tolist()
        assert 0 < result.accepted[0] < NEW


@pytest.mark.parametrize("row", range(3))
def test_lookup(models, row: int) -> None:
    ours, theirs = models[:2]
    prompt = PROMPT[row : row + 1, REAL[row]].repeat(1, 4)
    expected = written_by(theirs, prompt, do_sample=False, max_new_tokens=NEW, prompt_lookup_num_tokens=4)
    assert ours.generate(prompt, max_new_tokens=NEW, prompt_lookup_num_tokens=4).tolist() == expected.tolist()


def test_rows_together(models) -> None:
    """Theirs takes one row at a time."""
    ours, theirs, small, _ = models
    together = ours.generate(PROMPT, REAL, max_new_tokens=NEW, assistant_model=small)
    expected = written_by(theirs, PROMPT, REAL, do_sample=False, max_new_tokens=NEW)
    assert together.tolist() == expected.tolist()
