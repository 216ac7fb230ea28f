"""Sources of a stack: each layer detects a change, and projects a source once."""

from __future__ import annotations

import pytest
import torch

from tests.blocks.stacks import Layer, make, run_chunks
from tests.conversations import assert_same
from tests.counting import calls_of
from tests.setups import padding, tokens
from transformer.blocks import BlockStack

READERS = tuple(Layer(3 if index % 2 else None, groups=2, reads=True) for index in range(4))


def projections(stack: BlockStack, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers whose cross-attention projects its source, one entry for each time from now on."""
    return calls_of({block.cross_attention.k_proj: index for index, block in enumerate(stack.blocks)}, monkeypatch)


def test_a_changed_source_is_noticed_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issues: transformers UMT5 (reproduced, with bit-identical answers), flash-attn `MHA` (keys appended
    at each step). Every layer projects a source once, and anew after each change, whether in place, of the mask, or by
    another tensor; equal content is no change in any of them."""
    stack, plain = make(READERS), make(READERS)
    for block in plain.blocks:
        block.cross_attention.use_kv_cache = False
    ran, source, mask = projections(stack, monkeypatch), tokens(2, 5, 16, seed=9), padding([(0, 5), (1, 3)], 5)
    projected = []
    with torch.no_grad():
        for step in range(10):
            if step == 2:
                source[1, 2] += 1.0
            elif step == 4:
                mask[0, 4] = False
            elif step == 6:
                source = source.clone()
            elif step == 8:
                source = tokens(2, 5, 16, seed=10)
            x = tokens(2, 1, 16, seed=step)
            out = stack(x, source, source_mask=mask)
            assert_same(out, plain(x, source, source_mask=mask), atol=1e-12)
            projected.append(ran.copy())
            ran.clear()
    every = [0, 1, 2, 3]
    assert projected == [every, [], every, [], every, [], [], [], every, []]


@pytest.mark.parametrize(("encoders", "decoders"), [(1, 4), (4, 1), (2, 2)])
def test_more_decoder_than_encoder_layers(encoders: int, decoders: int) -> None:
    """Issues: transformers 5.23 (reproduced). UMT5 with more decoder than encoder layers crashed as soon as its cache
    was used. The caches follow the decoder, whatever stands in the encoder."""
    encoder = make((Layer(), Layer(2)) * 2, "t5 bidirectional", causal=False, cached=False)
    encoder = BlockStack(encoder.blocks[:encoders], encoder.norm)
    decoder, plain = (make(READERS[:decoders], "t5 causal", cached=cached) for cached in (True, False))
    mask, x = padding([(0, 5), (2, 3)], 5), tokens(2, 6, 16)
    with torch.no_grad():
        source = {"source": encoder(tokens(2, 5, 16, seed=3), attention_mask=mask), "source_mask": mask}
        assert_same(run_chunks(decoder, x, (1,) * 6, **source), plain(x, **source))
    assert [block.attention.kv_cache.length for block in decoder.blocks] == [6] * decoders
