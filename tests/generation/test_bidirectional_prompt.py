"""Prompts of a prefix LM: read in both directions in one call, then continued in causal order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.variants import VARIANTS, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from transformer.errors import ArgumentError, CacheStateError
from transformer.generation import Batch, PrefixCache

PROMPT, REAL = ids(3, 5, seed=3), padding([(0, 5), (2, 3), (4, 1)], 5)


def by_hand(model: torch.nn.Module, row: Tensor, number: int) -> list[int]:
    """The most probable tokens, each by a whole forward."""
    tokens = row.view(1, -1)
    for _ in range(number):
        logits = model(tokens, prefix_lengths=torch.tensor([len(row)]))
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    return tokens[0, len(row) :].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_of_whole_forwards(variant: str) -> None:
    """Padded, cached and not, looked up, in beams, streamed, in a conversation that goes on, and in a batch."""
    model = decoder_only(variant)
    options = {"max_new_tokens": 4, "bidirectional_prompt": True}
    with torch.no_grad():
        expected = [by_hand(model, row[real], 4) for row, real in zip(PROMPT, REAL, strict=True)]
    for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2}):
        assert model.generate(PROMPT, REAL, **options, **more)[:, 5:].tolist() == expected
    assert torch.stack(list(model.stream(PROMPT, REAL, **options)), 1).tolist() == expected
    beams = [model.generate(PROMPT, REAL, num_beams=2, **options, **more) for more in ({}, {"use_cache": False})]
    assert torch.equal(*beams)
    batch = Batch(model)
    numbers = [batch.add(row[real], **options) for row, real in zip(PROMPT, REAL, strict=True)]
    while len(batch):
        batch.step()
    finished = batch.finished()
    assert [finished[number].tolist()[-4:] for number in numbers] == expected
    model.enable_cache()
    for more in ({}, {"num_beams": 2}):
        model.clear_cache()
        before = model.generate(PROMPT, REAL, **options, **more)
        new = ids(3, 2, seed=4)
        whole = torch.cat((before, new), 1)
        mask = torch.cat((REAL, torch.ones(3, 6, dtype=torch.bool)), 1)
        with torch.no_grad():
            logits = model(new)
            snapshot = kept(model)
            with pytest.raises(CacheStateError, match="bidirectional_prompt: expected a prompt that begins"):
                model.generate(new, **options)
            assert kept(model) == snapshot
            model.disable_cache()
            expected_logits = model(whole, mask, prefix_lengths=REAL.sum(-1))[:, -2:]
            model.enable_cache()
        torch.testing.assert_close(logits, expected_logits, atol=1e-10, rtol=0)


def test_what_cannot_is_refused() -> None:
    model, options = decoder_only(), {"max_new_tokens": 1, "bidirectional_prompt": True}
    with pytest.raises(ArgumentError, match=r"bidirectional_prompt.*got EncoderDecoderTransformer"):
        encoder_decoder().generate(PROMPT, **options)
    with pytest.raises(ArgumentError, match="bidirectional_prompt"):
        PrefixCache(model, 1 << 20).generate(PROMPT, **options)
    with pytest.raises(ArgumentError, match="bidirectional_prompt: expected True or False"):
        model.generate(PROMPT, max_new_tokens=1, bidirectional_prompt=3)
