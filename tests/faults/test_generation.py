"""Exceptions in any operation of a generation: the conversation is unchanged, and the repeated call succeeds."""

from __future__ import annotations

import pytest
import torch

from tests.faults.inject import ERRORS, Injected
from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding

REAL = padding([(0, 3), (1, 2)], 3)
RAISED = tuple({error if isinstance(error, type) else RuntimeError for error in ERRORS})


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"temperature": 1.0, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2, "max_new_tokens": 4},
    ],
)
@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
def test_every_fifty_ninth_operation(build, options: dict[str, object]) -> None:
    """Prime, so that over the layers each kind of operation is met."""
    variant = "gqa relative, pattern"
    prompt = ids(2, 3, VOCAB if build is decoder_only else VOCAB + 2)
    given = {"max_new_tokens": 2, "prefill_chunk_size": 2, **options}

    def conversation():
        model = build(variant).enable_cache(max_length=12)
        model.generate(ids(2, 2), max_new_tokens=2)
        return model

    def go_on(model) -> torch.Tensor:
        return model.generate(prompt, REAL, generator=torch.Generator().manual_seed(0), **given)

    model, clean = conversation(), conversation()
    with Injected() as counting:
        expected = go_on(clean)
    before = kept(model)
    for at in range(0, counting.count, 59):
        with pytest.raises(RAISED), Injected(at):
            go_on(model)
        assert kept(model) == before
    assert torch.equal(go_on(model), expected)
    assert kept(model) == kept(clean)


def test_a_stream_that_fails_at_its_next_token() -> None:
    """The conversation has the prompt and the yielded tokens, and continues."""
    for at in range(0, 150, 19):
        model, clean = decoder_only().enable_cache(), decoder_only().enable_cache()
        stream = model.stream(ids(2, 3), max_new_tokens=9)
        came = [next(stream)]
        with pytest.raises(RAISED), Injected(at):
            came += stream
        assert next(stream, None) is None
        clean(ids(2, 3))
        with torch.no_grad():
            clean(torch.stack(came, 1)[:, : model.kv_cache.length - 3])
            assert model.kv_cache.length == 3 + len(came)
            turn = ids(2, 1, seed=1)
            torch.testing.assert_close(model(turn), clean(turn), rtol=0, atol=1e-10)
