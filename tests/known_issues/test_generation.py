"""Beams, prompts and conversations of whole models, in cases where other libraries were wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding


def test_beams_are_reordered_in_every_part() -> None:
    """Issues: transformers#46612 #45510 #48700. Beams were reordered in one cache but not in another. Beams that change
    places at every step, over self-attention with sinks and windows and over sources of different lengths, cached and
    not."""
    source, real = ids(3, 5, VOCAB + 2), padding([(0, 5), (0, 2), (1, 3)], 5)
    for variant in ("mqa alibi, window and sinks", "gqa relative, pattern"):
        model, moved = encoder_decoder(variant), 0
        select = type(model.kv_cache or model.enable_cache().kv_cache).select

        def counted(cache, rows, select=select):
            nonlocal moved
            moved += list(rows) != sorted(rows)
            return select(cache, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transformer.cache.KVCache.select", counted)
            given = {"max_new_tokens": 7, "num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
            out = model.generate(source, real, **given)
        assert moved
        assert torch.equal(out, model.generate(source, real, use_cache=False, **given))


def test_a_prompt_is_not_changed_by_its_use() -> None:
    """Issues: transformers#37078. What is given to read from stays as it was, and serves many times."""
    model, prompt, real = decoder_only().enable_cache(), ids(2, 4), padding([(0, 4), (0, 2)], 4)
    before = prompt.clone(), real.clone()
    model(prompt, real)
    stored = model.kv_cache.fork()
    for options in ({}, {"num_beams": 3}, {"temperature": 1.0, "num_return_sequences": 2}):
        model.clear_cache()
        stored.fork().install(model)
        model.generate(prompt, real, max_new_tokens=3, stop_tokens=[1], repetition_penalty=1.2, **options)
    assert torch.equal(prompt, before[0])
    assert torch.equal(real, before[1])
    assert stored.lengths.tolist() == [4, 2]


def test_after_clear_a_conversation_is_a_new_one() -> None:
    """Issues: transformers#48809. Reset zeroed the buffer but kept the length."""
    for model in (decoder_only("mha learned, after"), encoder_decoder("mqa sinusoidal")):
        expected = model.generate(ids(2, 4), max_new_tokens=4)
        model.enable_cache(max_length=20)
        for _ in range(2):
            assert torch.equal(model.generate(ids(2, 4), max_new_tokens=4), expected)
            model.clear_cache()
        assert kept(model) == [None] * len(kept(model))


def test_a_changed_source_is_read_anew() -> None:
    """Issues: transformers UMT5. A changed encoder output kept being answered from the old one."""
    model, source = encoder_decoder().enable_cache(), ids(2, 4, VOCAB + 2)
    target = ids(2, 5)
    with torch.no_grad():
        model(source, target[:, :4])
        other = (source + 1) % (VOCAB + 2)
        fresh = encoder_decoder().enable_cache()
        fresh(source, target[:, :4])
        out: Tensor = model(other, target[:, 4:])
        assert not torch.allclose(out, fresh(source, target[:, 4:]))
        fresh.kv_cache.truncate(4)
        for block in fresh.decoder.blocks:
            block.cross_attention.kv_cache = None
        torch.testing.assert_close(out, fresh(other, target[:, 4:]), rtol=0, atol=1e-10)
