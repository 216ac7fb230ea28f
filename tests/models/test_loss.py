"""Loss of whole models over labels: that of transformers and of `cross_entropy`, also over chunks of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSeq2SeqLM, T5Config, UMT5Config

from tests.checkpoints import theirs as decoders
from tests.checkpoints.test_t5 import SIZES as T5_SIZES
from tests.models.variants import VARIANTS, VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.peers.models import fill, no_float32
from tests.setups import padding
from transformer import DecoderOnlyTransformer
from transformer.blocks import BlockStack
from transformer.checkpoints import load_model
from transformer.errors import ArgumentError, DtypeError, ShapeError
from transformer.models import ModelOutput, loss
from transformer.models.loss import IGNORED

REAL = padding([(0, 7), (2, 5), (0, 4), (6, 1)], 7)
CHUNKED = {"logits_to_keep": 1}


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of three tokens."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 3 * VOCAB + 1)
    return 3


def by_hand(model: nn.Module, tokens: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
    """Each label by the logits of the token before it, where both are real."""
    logits, counted = model(tokens, real), []
    for row in range(tokens.shape[0]):
        for column in range(1, tokens.shape[1]):
            is_real = real is None or bool(real[row, column - 1] and real[row, column])
            if is_real and labels[row, column] != IGNORED:
                counted.append(cross_entropy(logits[row, column - 1], labels[row, column]))
    return torch.stack(counted).mean()


def gradients(model: nn.Module, result: Tensor) -> list[Tensor]:
    model.zero_grad()
    result.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


# --- equal to others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, REAL], ids=["no padding", "padding"])
@pytest.mark.parametrize("family", ["llama, tied", "gemma2", "gpt2"])
def test_decoders_of_transformers(family: str, mask: Tensor | None, tmp_path: Path) -> None:
    with no_float32():
        theirs = decoders.make(decoders.CASES[family])
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_model(tmp_path, torch.float64), decoders.ids(4, 7)
    labels = tokens.clone()
    labels[0, 3:5] = IGNORED
    positions = None
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # Theirs count what padding predicts.
        labels[~mask] = IGNORED
        labels[:, 1:][~mask[:, :-1]] = IGNORED
    with no_float32():
        expected = theirs(tokens, attention_mask=mask, position_ids=positions, labels=labels)
    output = ours(tokens, mask, labels=labels)
    assert isinstance(output, ModelOutput)
    close(output.loss, expected.loss)
    close(ours(tokens, mask, labels=labels, **CHUNKED).loss, expected.loss)
    assert torch.equal(output.logits, ours(tokens, mask))


@pytest.mark.parametrize("kind", [T5Config, UMT5Config])
def test_t5_of_transformers(kind: type[T5Config], tmp_path: Path) -> None:
    config = kind(**T5_SIZES | {"pad_token_id": 2})
    theirs = AutoModelForSeq2SeqLM.from_config(deepcopy(config), dtype=torch.float64).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, torch.float64)
    source, labels = decoders.ids(3, 9), decoders.ids(3, 5, seed=2)
    labels[1, 3:] = IGNORED
    target = decoders.ids(3, 5, seed=3)
    name = "target_ids" if kind is T5Config else "decoder_input_ids"
    for given, theirs_given in (({}, {}), ({name: target}, {"decoder_input_ids": target})):
        with no_float32():
            expected = theirs(source, labels=labels, **theirs_given)
        output = ours(source, labels=labels, **given)
        close(output.loss, expected.loss)
        torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-9)
        close(ours(source, labels=labels, **given, **CHUNKED).loss, expected.loss)


@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "padding"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("few_at_once")
def test_loss_and_gradients_are_those_of_cross_entropy(variant: str, real: Tensor | None) -> None:
    model, tokens = decoder_only(variant).train(), ids(4, 7)
    labels = ids(4, 7, seed=3)
    labels[0, 2] = labels[2, 1] = IGNORED
    expected = by_hand(model, tokens, labels, real)
    wanted = gradients(model, expected)
    for given in ({}, CHUNKED):
        output = model(tokens, real, labels=labels, **given)
        close(output.loss, expected)
        for own, other in zip(gradients(model, output.loss), wanted, strict=True):
            close(own, other)


@pytest.mark.usefixtures("few_at_once")
def test_targets_of_an_encoder_decoder() -> None:
    """Padding of targets does not count, and labels alone are shifted to the right."""
    model, source, target = encoder_decoder(pad_token=4), ids(4, 6), ids(4, 7)
    labels = ids(4, 7, seed=3)
    logits = model(source, target, target_mask=REAL)
    expected = cross_entropy(logits[REAL], labels[REAL])
    for given in ({}, CHUNKED):
        close(model(source, target, target_mask=REAL, labels=labels, **given).loss, expected)
    labels[1, 4:] = IGNORED
    shifted = torch.cat((torch.zeros_like(labels[:, :1]), labels[:, :-1]), 1)
    shifted[shifted == IGNORED] = 4
    logits = model(source, shifted)
    output = model(source, labels=labels)
    close(output.loss, cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert torch.equal(output.logits, logits)
    states = model(source)
    close(model(encoder_hidden_states=states, labels=labels).loss, output.loss)


def test_what_stands_at_padding_has_no_influence() -> None:
    model, tokens, labels = decoder_only(), ids(4, 7), ids(4, 7, seed=3)
    expected = model(tokens, REAL, labels=labels).loss
    others = labels.masked_fill(~REAL, 5)
    assert torch.equal(model(tokens.masked_fill(~REAL, 2), REAL, labels=others).loss, expected)


# --- chunks -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor whose last dimension is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for each in out if isinstance(out, tuple | list) else [out]:
            # Not the weight of the head, transposed.
            if isinstance(each, Tensor) and each.ndim > 1 and each.shape[-1] == VOCAB and each.shape[0] != 16:
                self.numbers = max(self.numbers, each.numel())
        return out


@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "padding"])
@pytest.mark.parametrize("variant", ["mha rotary", "gqa rotary, window, both"])
def test_whole_logits_are_never_formed(variant: str, real: Tensor | None, few_at_once: int) -> None:
    model, tokens = decoder_only(variant).train(), ids(4, 7)
    for given, most in (({}, 4 * 7 * VOCAB), (CHUNKED, 4 * VOCAB)):
        with Largest() as largest:
            output = model(tokens, real, labels=tokens, **given)
            output.loss.backward()
        # The last logits of each row are more than those of a chunk.
        assert largest.numbers == max(most, few_at_once * VOCAB)
        assert output.logits.shape == (4, given.get("logits_to_keep", 7), VOCAB)


@pytest.mark.usefixtures("few_at_once")
def test_a_head_that_is_shown_rows_is_called_once() -> None:
    model, tokens, shapes = decoder_only(), ids(4, 7), []
    expected = model(tokens, labels=tokens).loss
    model.head.register_forward_hook(lambda _, given, out: shapes.append(out.shape))
    output = model(tokens, labels=tokens, **CHUNKED)
    assert shapes == [(4, 7, VOCAB)]
    close(output.loss, expected)
    assert output.logits.shape == (4, 1, VOCAB)


def test_half_precision_sums_in_float32() -> None:
    model, tokens = decoder_only().bfloat16(), ids(4, 7)
    output = model(tokens, labels=tokens)
    assert output.loss.dtype == torch.float32
    logits = output.logits[:, :-1].flatten(0, 1).float()
    torch.testing.assert_close(output.loss, cross_entropy(logits, tokens[:, 1:].flatten()))
    torch.testing.assert_close(model(tokens, labels=tokens, **CHUNKED).loss, output.loss)


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_states_and_weights_come_beside_the_loss() -> None:
    model, tokens = decoder_only(), ids(2, 5)
    output = model(tokens, labels=tokens, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    assert output.loss.ndim == 0
    assert model(tokens, output_attentions=True).loss is None


def test_nothing_to_predict_is_nan_as_by_cross_entropy() -> None:
    model, tokens = decoder_only(), ids(2, 5)
    for given in ({}, CHUNKED):
        assert model(tokens, labels=torch.full_like(tokens, IGNORED), **given).loss.isnan()
        assert model(tokens[:, :1], labels=tokens[:, :1], **given).loss.isnan()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (ids(2, 4), ShapeError, r"^labels: expected \[2, 5\], one for each token, got \[2, 4\]"),
        (ids(2, 5).float(), DtypeError, "^labels: expected int64"),
        (ids(2, 5) + VOCAB, ArgumentError, "^labels: expected token ids from 0"),
        (ids(2, 5) - 99, ArgumentError, "^labels: expected token ids from 0"),
        (ids(2, 5).tolist(), ArgumentError, "^labels: expected a tensor"),
    ],
)
def test_labels_are_checked_before_a_cache_changes(labels: object, error: type[Exception], message: str) -> None:
    model = decoder_only().enable_cache()
    model(ids(2, 3))
    before = kept(model)
    with pytest.raises(error, match=message):
        model(ids(2, 5), labels=labels)
    assert kept(model) == before
    with pytest.raises(error, match=message):
        encoder_decoder()(ids(2, 5), ids(2, 5), labels=labels)


def test_a_model_without_a_head_refuses_labels() -> None:
    with pytest.raises(ArgumentError, match=r"^labels: expected a model with a head"):
        decoder_only(has_head=False)(ids(2, 5), labels=ids(2, 5))


def test_a_model_by_parts() -> None:
    whole = decoder_only(tied_embeddings=False)
    parts = DecoderOnlyTransformer.from_parts(
        whole.embedding, BlockStack(whole.decoder.blocks, whole.decoder.norm), whole.head.proj
    ).eval()
    tokens = ids(2, 5)
    for given in ({}, CHUNKED):
        close(parts(tokens, labels=tokens, **given).loss, whole(tokens, labels=tokens).loss)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler", "few_at_once")
@pytest.mark.parametrize("given", [{}, CHUNKED], ids=["whole", "chunks"])
def test_compiled(given: dict[str, int]) -> None:
    model, tokens = decoder_only().train(), ids(2, 5)
    expected = gradients(model, model(tokens, labels=tokens).loss)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for own, other in zip(gradients(model, compiled(tokens, labels=tokens, **given).loss), expected, strict=True):
        close(own, other)
