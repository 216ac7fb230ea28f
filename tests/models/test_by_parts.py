"""Models that a user composes of modules: they are the models that options build."""

from __future__ import annotations

import pytest
import torch

from tests.models.variants import VARIANTS, decoder_only, ids
from transformer.models import ComposedConfig, DecoderOnlyTransformer


def by_parts(variant: str) -> tuple[DecoderOnlyTransformer, DecoderOnlyTransformer]:
    """A model by options, and one by parts of the same weights."""
    model, parts = decoder_only(variant), decoder_only(variant)
    return model, DecoderOnlyTransformer.from_parts(parts.embedding, parts.decoder, parts.head, parts.positions).eval()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_model_by_parts_is_the_one_by_options(variant: str) -> None:
    expected, model = by_parts(variant)
    assert type(model.config) is ComposedConfig
    assert torch.equal(model(ids(2, 6)), expected(ids(2, 6)))
    assert torch.equal(model.generate(ids(2, 4), max_new_tokens=6), expected.generate(ids(2, 4), max_new_tokens=6))
