"""Deprecated TypedDicts of the options of models: still there, derived from the configurations, with a warning."""

from __future__ import annotations

from dataclasses import fields

import pytest

from transformer import models

SHAPE = {"vocab_size", "src_vocab_size", "tgt_vocab_size", "d_model", "num_heads", "d_ff", "num_layers"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LayerKeywords", models.LayerOptions),
        ("DecoderOnlyKeywords", models.DecoderOnlyConfig),
        ("EncoderDecoderKeywords", models.EncoderDecoderConfig),
        ("EncoderKeywords", models.EncoderConfig),
    ],
)
def test_an_old_name_has_the_options_and_warns(name: str, options: type[models.LayerOptions]) -> None:
    with pytest.warns(DeprecationWarning, match=rf"transformer\.models\.{name} is now .*\.{options.__name__};"):
        keywords = getattr(models, name)
    assert keywords.__annotations__ == {each.name: each.type for each in fields(options) if each.name not in SHAPE}
    assert not keywords.__total__
