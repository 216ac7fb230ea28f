"""Padded batches through whole models: heads compute real tokens alone, unless they are of a user's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.setups import fill, padding
from transformer import DecoderOnlyTransformer
from transformer.kernels import tuned
from transformer.models import EncoderDecoderTransformer

SPANS, LENGTH = [(0, 4), (2, 5), (3, 0), (6, 1)], 7
MASK = padding(SPANS, LENGTH)


def ids() -> Tensor:
    return torch.randint(31, (len(SPANS), LENGTH), generator=torch.Generator().manual_seed(1))


def models() -> list[nn.Module]:
    made: list[nn.Module] = [
        DecoderOnlyTransformer(31, 16, 4, 8, 2, tied_embeddings=False, position="learned", max_length=9),
        DecoderOnlyTransformer(31, 16, 4, 8, 2, tied_embeddings=True, logit_softcap=2.0),
        EncoderDecoderTransformer(31, 31, 16, 4, 8, 2),
    ]
    for seed, model in enumerate(made):
        fill(model.double().eval(), seed)
    return made


def logits(model: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
    out: Tensor = (
        model(tokens, mask) if isinstance(model, DecoderOnlyTransformer) else model(tokens, tokens, mask, mask)
    )
    return out


@pytest.mark.parametrize("rows", [0, 10**6])
@pytest.mark.parametrize("index", range(3))
@torch.no_grad()
def test_a_row_is_alone(index: int, rows: int) -> None:
    """Cases of both ways of attention; a row without a token gets 0."""
    model = models()[index]
    with tuned(min_row_tokens=rows):
        out = logits(model, ids(), MASK)
    assert not out[~MASK].any()
    for row, span in enumerate(MASK):
        if span.any():
            alone = logits(model, ids()[row, span][None], None)[0]
            torch.testing.assert_close(out[row, span], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("index", range(3))
@torch.no_grad()
def test_a_head_with_hooks_is_given_rows(index: int) -> None:
    model, given = models()[index], []
    expected = logits(model, ids(), MASK)
    model.head.register_forward_pre_hook(lambda _, given_to: given.append(tuple(given_to[0].shape[:2])))
    out = logits(model, ids(), MASK)
    assert given == [tuple(MASK.shape)]
    torch.testing.assert_close(out[MASK], expected[MASK], rtol=0, atol=1e-12)
    assert logits(model, ids(), None).shape[:2] == MASK.shape
