"""Packed documents, prefixes and positions of the caller in whole models: training, caches, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conversations import assert_same
from tests.models.variants import VARIANTS, decoder_only, encoder_decoder, ids, kept
from tests.simulated_device import DEVICE, counted_waits, on_device
from transformer.attention import TokenLayout
from transformer.errors import ArgumentError, CacheStateError, DeviceError, DtypeError, ShapeError
from transformer.models import DecoderOnlyTransformer, EncoderTransformer, ModelOutput

SEGMENTS = torch.tensor([[3, 3, 3, 3, 1, 1, 0, 2, 2, 2, 2, 2], [0, 0, 5, 5, 5, 5, 5, 5, 5, 7, 0, 7]])
DOCUMENTS = [(0, 0, 4), (0, 4, 6), (0, 7, 12), (1, 2, 9), (1, 9, 10), (1, 11, 12)]
"""Row, first and last column of each."""
IDS = ids(2, 12)
PADDED = IDS.where(SEGMENTS != 0, -1)
PREDICTED = sum(end - begin - 1 for _, begin, end in DOCUMENTS)


def loss_apart(model: DecoderOnlyTransformer) -> Tensor:
    """The mean over all predicted tokens of documents that are read one by one."""
    losses = []
    for row, begin, end in DOCUMENTS:
        own = IDS[row : row + 1, begin:end]
        if end - begin > 1:
            losses.append(model(own, labels=own).loss * (end - begin - 1))
    return sum(losses) / PREDICTED


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_on_packed_rows_is_training_on_the_documents_apart(variant: str) -> None:
    """Logits, loss, whole or in chunks, and every gradient."""
    model = decoder_only(variant).train()
    expected = loss_apart(model)
    gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for keep in (0, 1):
        packed: ModelOutput = model(PADDED, segment_ids=SEGMENTS, labels=IDS, logits_to_keep=keep)
        assert_same(packed.loss, expected)
        assert_same(torch.autograd.grad(packed.loss, list(model.parameters()), allow_unused=True), gradients)
    output = model(PADDED, segment_ids=SEGMENTS, output_hidden_states=True, output_attentions=True)
    for row, begin, end in DOCUMENTS:
        alone = model(IDS[row : row + 1, begin:end], output_attentions=True)
        assert_same(output.logits[row, begin:end], alone.logits[0])
        for packed, own in zip(output.attentions, alone.attentions, strict=True):
            assert_same(packed[row, :, begin:end, begin:end], own[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prefix_is_read_in_both_directions_and_then_continued(variant: str) -> None:
    """In one call, padded, and in a cached call that others follow; its labels do not count."""
    model, prefix = decoder_only(variant), torch.tensor([5, 0])
    whole = model(IDS, prefix_lengths=prefix)
    if variant != "mha none":
        assert not torch.allclose(whole[0, 0], model(IDS)[0, 0])
    assert_same(whole[1], model(IDS)[1])
    padded, mask = torch.full((2, 15), -1), torch.zeros(2, 15, dtype=torch.bool)
    padded[0, 3:], padded[1, :12], mask[0, 3:], mask[1, :12] = IDS[0], IDS[1], True, True
    assert_same(model(padded, mask, prefix_lengths=prefix)[mask], whole.flatten(0, 1))
    labels = IDS.clone()
    labels[0, :5] = -100
    assert_same(
        model(IDS, labels=IDS, prefix_lengths=prefix).loss, model(IDS, labels=labels, prefix_lengths=prefix).loss
    )
    model.enable_cache()
    with torch.no_grad():
        calls = [model(IDS[:, :7], prefix_lengths=prefix), model(IDS[:, 7:10]), model(IDS[:, 10:])]
        assert_same(torch.cat(calls, 1), whole)
        before = kept(model)
        with pytest.raises(CacheStateError, match="prefix_lengths"):
            model(IDS, prefix_lengths=prefix)
        with pytest.raises(ArgumentError, match="segment_ids"):
            model(PADDED, segment_ids=SEGMENTS)
    assert kept(model) == before


@pytest.mark.parametrize("variant", ["mha rotary", "gqa relative, pattern", "mha learned, after", "mqa sinusoidal"])
def test_positions_in_place_of_counted_ones(variant: str) -> None:
    """Counted ones say the same, others another thing; with segments they are positions of documents."""
    model, counted = decoder_only(variant), torch.arange(12).expand(2, 12)
    assert_same(model(IDS, position_ids=counted), model(IDS))
    assert not torch.allclose(model(IDS, position_ids=2 * counted), model(IDS))
    within = TokenLayout.positions_in_documents(SEGMENTS)
    packed = model(PADDED, segment_ids=SEGMENTS)
    assert_same(model(PADDED, segment_ids=SEGMENTS, position_ids=within), packed)
    if variant == "mha learned, after":
        with pytest.raises(ArgumentError, match=r"position_ids.*24"):
            model(IDS, position_ids=counted + 20)
    if variant != "gqa relative, pattern":
        model.enable_cache()
        with torch.no_grad():
            calls = [model(IDS[:, part], position_ids=2 * counted[:, part]) for part in (slice(0, 7), slice(7, 12))]
            assert_same(torch.cat(calls, 1), model.disable_cache()(IDS, position_ids=2 * counted))


def test_an_encoder_of_packed_texts() -> None:
    model = EncoderTransformer(11, 16, 4, 20, 2, position="learned", max_length=8, num_token_types=2).double().eval()
    types = torch.arange(24).view(2, 12) % 2
    packed = model(PADDED, None, types, segment_ids=SEGMENTS)
    for row, begin, end in DOCUMENTS:
        own = slice(begin, end)
        assert_same(packed[row, own], model(IDS[row : row + 1, own], None, types[row : row + 1, own])[0])


def test_what_an_encoder_decoder_refuses() -> None:
    model = encoder_decoder()
    with pytest.raises(ArgumentError, match="segment_ids"):
        model(IDS, IDS, segment_ids=SEGMENTS)
    x, source = torch.zeros(2, 12, 16, dtype=torch.float64), torch.zeros(2, 3, 16, dtype=torch.float64)
    steps = model.decoder.plan(x, layout=TokenLayout(SEGMENTS))
    with pytest.raises(ArgumentError, match=r"segment_ids.*source"):
        model.decoder(x, source, steps=steps)
    with pytest.raises(ArgumentError, match=r"segment_ids.*source"):
        model.decoder.blocks[0](x, source, step=steps[0])


@pytest.mark.parametrize("variant", ["gqa rotary, window, both", "mha learned, after", "mqa alibi, window and sinks"])
def test_a_device_is_asked_once(variant: str) -> None:
    """For the segments, or for the prefixes; layers ask nothing."""
    model, prefix = decoder_only(variant, torch.float32), torch.tensor([5, 0])
    with torch.no_grad():
        expected = model(IDS, segment_ids=SEGMENTS), model(IDS, prefix_lengths=prefix)
        moved = on_device(model)
        with counted_waits() as waits:
            there = IDS.to(DEVICE), SEGMENTS.to(DEVICE), prefix.to(DEVICE)
            waits.clear()
            packed = moved(there[0], segment_ids=there[1])
            assert len(waits) == 1, waits
            prefixed = moved(there[0], prefix_lengths=there[2])
            assert len(waits) == 2, waits
    for out, own in zip((packed, prefixed), expected, strict=True):
        torch.testing.assert_close(out.numbers, own, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_an_exported_graph_serves_packed_rows_of_every_length() -> None:
    model, length = decoder_only(num_layers=1), torch.export.Dim("L", max=64)
    shapes = {"input_ids": {1: length}, "segment_ids": {1: length}}
    given = {"segment_ids": SEGMENTS}
    exported = torch.export.export(model, (IDS,), given, dynamic_shapes=shapes, strict=False).module()
    for number in (12, 2, 7):
        own, real = (IDS[:, :number], SEGMENTS[:, :number]), (SEGMENTS[:, :number] != 0).unsqueeze(-1)
        assert_same(exported(own[0], segment_ids=own[1]) * real, model(own[0], segment_ids=own[1]) * real)


@pytest.mark.parametrize(
    ("error", "prefix"),
    [
        (ShapeError, torch.ones(3, dtype=torch.int64)),
        (ShapeError, torch.ones(2, 1, dtype=torch.int64)),
        (DtypeError, torch.ones(2)),
        (DeviceError, torch.ones(2, dtype=torch.int64, device="meta")),
    ],
    ids=["rows", "rank", "dtype", "device"],
)
def test_labels_beside_a_wrong_prefix_are_refused_by_its_name(error: type[Exception], prefix: Tensor) -> None:
    with pytest.raises(error, match="prefix_lengths"):
        decoder_only()(IDS, labels=IDS, prefix_lengths=prefix)
