"""Encoders of other families than BERT, and classifiers: saved by transformers, loaded, and saved for transformers."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from tests.checkpoints.folders import edit_config, edit_tensors
from tests.checkpoints.test_bert import CONFIG as BERT
from tests.checkpoints.theirs import VOCAB, ids
from tests.peers.models import fill
from transformer.checkpoints import load_config, load_model, save_model
from transformer.errors import ArgumentError, ConfigurationError, FileFormatError, ShapeError
from transformer.models import EncoderClassifier, EncoderTransformer, pooled

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "type_vocab_size": 1,
}
ROBERTA, XLM = RobertaConfig(**SIZES), XLMRobertaConfig(**SIZES | {"pad_token_id": 3, "type_vocab_size": 2})
DISTILBERT_SIZES = {"vocab_size": VOCAB, "dim": 24, "n_heads": 4, "hidden_dim": 36, "n_layers": 3}
DISTILBERT = DistilBertConfig(**DISTILBERT_SIZES, max_position_embeddings=16, activation="relu")
MODERN = ModernBertConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    num_attention_heads=4,
    intermediate_size=36,
    num_hidden_layers=4,
    max_position_embeddings=64,
    local_attention=4,
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 900.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    cls_token_id=1,
    sep_token_id=2,
)
ENCODERS: dict[str, PreTrainedConfig] = {
    "RobertaModel": ROBERTA,
    "RobertaForMaskedLM": ROBERTA,
    "XLMRobertaModel": XLM,
    "DistilBertModel": DISTILBERT,
    "DistilBertForMaskedLM": DISTILBERT,
    "ModernBertModel": MODERN,
    "ModernBertForMaskedLM": MODERN,
}
KINDS = {"Bert": BERT, "Roberta": ROBERTA, "XLMRoberta": XLM, "DistilBert": DISTILBERT, "ModernBert": MODERN}
CLASSIFIERS = [f"{kind}For{what}Classification" for kind in KINDS for what in ("Sequence", "Token")]
LABELS = ("joy", "anger", "no feeling")
SPANS = [(0, 9), (0, 6), (0, 2)], [(0, 9), (3, 6), (7, 2)]


def saved(architecture: str, config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    model = getattr(transformers, architecture)(deepcopy(config)).eval()
    fill(model)
    model.save_pretrained(folder)
    return model


def batch(spans: list[tuple[int, int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids without the padding token except at padding, and their mask."""
    tokens = ids(len(spans), 9)
    tokens[tokens == pad] = 5
    mask = torch.zeros_like(tokens)
    for row, (first, count) in enumerate(spans):
        mask[row, first : first + count] = 1
    return tokens.where(mask == 1, pad), mask


@pytest.mark.parametrize("architecture", ENCODERS)
@torch.no_grad()
def test_states_there_and_back(architecture: str, tmp_path: Path) -> None:
    """With padding on the right, and on the left where transformers does not count it."""
    config = ENCODERS[architecture]
    theirs = saved(architecture, config, tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert type(ours) is EncoderTransformer
    for spans in SPANS[:1] if "Distil" in architecture else SPANS:
        tokens, mask = batch(spans, config.pad_token_id)
        expected = theirs.base_model(tokens, mask).last_hidden_state
        torch.testing.assert_close(ours(tokens, mask)[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)
    save_model(ours, tmp_path / "ours")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(tokens, mask).last_hidden_state, expected)
    assert torch.equal(load_model(tmp_path / "ours")(tokens, mask), ours(tokens, mask))


def labelled(config: PreTrainedConfig, labels: tuple[str, ...] = LABELS) -> PreTrainedConfig:
    config = deepcopy(config)
    config.id2label = dict(enumerate(labels))
    return config


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_logits_and_loss_there_and_back(architecture: str, tmp_path: Path) -> None:
    config = labelled(KINDS[architecture.partition("For")[0]])
    theirs = saved(architecture, config, tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert type(ours) is EncoderClassifier
    assert ours.config.labels == LABELS
    tokens, mask = batch(SPANS[0], config.pad_token_id)
    per_token = "Token" in architecture
    classes = ids(*((3, 9) if per_token else (3,)), seed=3) % 3
    expected = theirs(tokens, mask, labels=classes.masked_fill(mask == 0, -100) if per_token else classes)
    real = mask == 1 if per_token else slice(None)
    out = ours(tokens, mask, labels=classes, output_hidden_states=True)
    torch.testing.assert_close(out.logits[real], expected.logits[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=1e-5)
    assert len(out.hidden_states) == ours.config.num_layers + 1
    assert torch.equal(ours(tokens, mask)[real], out.logits[real])
    if architecture == "BertForSequenceClassification":
        first = pooled(out.last_hidden_state, mask, "cls")
        inner = theirs.bert(tokens, mask).pooler_output
        torch.testing.assert_close(ours.head.dense(first).tanh(), inner, rtol=0, atol=1e-5)
    out.loss.backward()
    expected.loss.backward()
    theirs_first = theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours.encoder.embedding.tokens.weight.grad, theirs_first, rtol=0, atol=1e-5)
    assert all(each.grad is not None for each in ours.parameters())
    save_model(ours, tmp_path / "ours")
    again = getattr(transformers, architecture.removeprefix("XLM")).from_pretrained(tmp_path / "ours").eval()
    assert again.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        assert torch.equal(again(tokens, mask).logits, theirs(tokens, mask).logits)
        assert torch.equal(load_model(tmp_path / "ours")(tokens, mask), ours(tokens, mask))
    assert load_config(tmp_path / "ours") == ours.config


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
@pytest.mark.parametrize("number", [1, 3])
def test_losses_of_rows(problem: str | None, number: int, tmp_path: Path) -> None:
    config = labelled(DISTILBERT, LABELS[:number])
    config.problem_type = problem
    theirs = saved("DistilBertForSequenceClassification", config, tmp_path)
    ours, (tokens, mask) = load_model(tmp_path), batch(SPANS[0], 0)
    wanted = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.5], [0.2, 0.3, 1.0]])[:, :number]
    expected = theirs(tokens, mask, labels=wanted).loss
    torch.testing.assert_close(ours(tokens, mask, labels=wanted).loss, expected, rtol=0, atol=1e-5)
    with pytest.raises(ShapeError, match="labels: expected"):
        ours(tokens, mask, labels=wanted[:2])


def test_a_new_head_is_trained(tmp_path: Path) -> None:
    """On an encoder without one, and saved in the format of its family."""
    saved("RobertaModel", ROBERTA, tmp_path / "theirs")
    encoder = load_model(tmp_path / "theirs")
    torch.manual_seed(0)
    model = EncoderClassifier.from_encoder(encoder, labels=("no", "yes"), head_activation="tanh")
    assert model.encoder is encoder
    tokens, mask = batch(SPANS[1], 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model(tokens, mask, labels=torch.tensor([0, 1, 1])).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    save_model(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [
        "RobertaForSequenceClassification"
    ]
    with pytest.raises(ArgumentError, match=r"labels: expected indices from 0 to 1"):
        model(tokens, mask, labels=torch.tensor([0, 2, 1]))


def test_a_classifier_of_other_options_is_saved_too(tmp_path: Path) -> None:
    options = {"pooling": "mean", "head_activation": "gelu", "head_norm": True, "labels": LABELS, "dense_bias": False}
    model = EncoderClassifier(VOCAB, 16, 4, 20, 1, **options).eval()
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(ids(2, 5)), model(ids(2, 5)))
    for name, value in {"pooling": "max", "labels": (), "head_activation": "elu", "problem_type": "x"}.items():
        with pytest.raises(ConfigurationError, match=f"^{name}: expected"):
            EncoderClassifier(VOCAB, 16, 4, 20, 1, **{name: value})


@torch.no_grad()
def test_modernbert_of_the_first_files(tmp_path: Path) -> None:
    """Bases and layers by their old keys, as in the released files, and a head that pools by the mean."""
    config = labelled(MODERN)
    config.classifier_pooling, config.classifier_bias = "mean", True
    theirs = saved("ModernBertForSequenceClassification", config, tmp_path)
    old = {"rope_parameters": None, "global_rope_theta": 900.0, "local_rope_theta": 20.0, "layer_types": None}
    edit_config(tmp_path, **old, global_attn_every_n_layers=3, position_embedding_type="absolute")
    ours = load_model(tmp_path)
    assert (ours.config.layer_pattern, ours.config.window_size) == ("full sliding sliding", 3)
    assert (ours.config.rotary_base, ours.config.rotary_sliding_base) == (900.0, 20.0)
    for spans in SPANS:
        tokens, mask = batch(spans, 0)
        torch.testing.assert_close(ours(tokens, mask), theirs(tokens, mask).logits, rtol=0, atol=1e-5)


def test_an_encoder_with_windows_of_other_options_is_saved_too(tmp_path: Path) -> None:
    """Layers that slide on both sides, with and without positions."""
    patterns = {"layer_pattern": "sliding full", "position_pattern": "rotary none", "rotary_sliding_base": 30.0}
    model = EncoderTransformer(VOCAB, 16, 4, 20, 4, window_size=3, **patterns, embedding_norm=True, first_norm=False)
    save_model(model.eval(), tmp_path / "model")
    again, (tokens, mask) = load_model(tmp_path / "model"), batch(SPANS[1], 0)
    assert again.config == model.config
    assert torch.equal(again(tokens, mask), model(tokens, mask))


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_a_missing_key_means_what_transformers_writes(architecture: str, tmp_path: Path) -> None:
    """Also of the head, of a file that has nothing but sizes."""
    config = KINDS[architecture.partition("For")[0]]
    sizes = {key: value for key, value in config.to_diff_dict().items() if key in SIZES or key in DISTILBERT_SIZES}
    sizes |= {"model_type": config.model_type, "architectures": [architecture]}
    read = []
    for content in (sizes, type(config)(**sizes).to_dict()):
        (tmp_path / "config.json").write_text(json.dumps(content))
        read.append(replace(load_config(tmp_path), context_length=None))
    assert read[0] == read[1]
    assert read[0].labels == ("LABEL_0", "LABEL_1")


REFUSED = [
    ("ModernBertModel", "sliding_window", {"sliding_window": 8}),
    ("ModernBertModel", "is_causal", {"is_causal": True}),
    ("ModernBertModel", "rope_scaling", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("ModernBertModel", "rope_parameters.rope_theta", {"rope_parameters": {"rope_theta": 7.0}}),
    (
        "ModernBertModel",
        "rope_parameters.sliding_attention.rope_type",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
    ),
    ("ModernBertModel", "hidden_activation", {"hidden_activation": "elu"}),
    ("RobertaModel", "position_embedding_type", {"position_embedding_type": "relative_key"}),
    ("RobertaModel", "is_decoder", {"is_decoder": True}),
    ("RobertaModel", "pad_token_id", {"pad_token_id": None}),
    ("RobertaModel", "max_position_embeddings", {"max_position_embeddings": 2}),
    ("DistilBertModel", "is_causal", {"is_causal": True}),
    ("DistilBertModel", "hidden_size", {"hidden_size": 12}),
    ("DistilBertModel", "activation", {"activation": "elu"}),
    ("BertForSequenceClassification", "id2label", {"id2label": {"0": "a", "2": "b"}}),
    ("BertForSequenceClassification", "num_labels", {"id2label": {"0": "a", "1": "b"}, "num_labels": 3}),
    ("BertForSequenceClassification", "problem_type", {"problem_type": "ranking"}),
]


@pytest.mark.parametrize(("architecture", "key", "changes"), REFUSED, ids=str)
def test_what_would_change_the_result_is_refused(architecture: str, key: str, changes: dict, tmp_path: Path) -> None:
    saved(architecture, ENCODERS.get(architecture, BERT), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigurationError, match=rf"^{tmp_path / 'config.json'}, {key}: expected"):
        load_config(tmp_path)


def test_a_head_that_is_lost_is_missed(tmp_path: Path) -> None:
    saved("BertForSequenceClassification", labelled(BERT), tmp_path)
    edit_config(tmp_path, id2label=None, num_labels=3)
    assert load_config(tmp_path).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    edit_tensors(tmp_path, lambda tensors: tensors.pop("bert.pooler.dense.weight"))
    with pytest.raises(FileFormatError, match=r"tensors of BertForSequenceClassification.* missing: bert.pooler.dense"):
        load_model(tmp_path)
