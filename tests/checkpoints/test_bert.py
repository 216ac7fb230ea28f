"""BERT checkpoints: saved by transformers, loaded here with equal outputs, and saved again for transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel, PreTrainedModel

from tests.checkpoints.theirs import VOCAB, ids
from tests.peers.models import fill
from transformer.checkpoints import load_model, save_model
from transformer.models import EncoderTransformer

CONFIG = BertConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    num_attention_heads=4,
    intermediate_size=36,
    num_hidden_layers=3,
    max_position_embeddings=16,
    hidden_act="gelu_new",
)


@pytest.fixture(scope="module", params=[BertModel, BertForMaskedLM])
def theirs(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = request.param(CONFIG).eval()
    fill(model)
    return model


@torch.no_grad()
def test_states_there_and_back(theirs: PreTrainedModel, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert type(ours) is EncoderTransformer
    tokens, types = ids(3, 9), (ids(3, 9, seed=2) > VOCAB // 2).long()
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
    expected = theirs.base_model(tokens, mask, types).last_hidden_state
    torch.testing.assert_close(ours(tokens, mask, types)[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)
    save_model(ours, tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(tokens, mask, types).last_hidden_state, expected)
    assert torch.equal(load_model(tmp_path / "ours")(tokens, mask, types), ours(tokens, mask, types))


@torch.no_grad()
def test_norms_of_old_files(theirs: PreTrainedModel, tmp_path: Path) -> None:
    """Files made from TensorFlow's, among them the first BERTs, call a norm's weight gamma and its bias beta."""
    theirs.save_pretrained(tmp_path)
    tokens = ids(2, 5)
    expected = load_model(tmp_path)(tokens)
    file = tmp_path / "model.safetensors"
    old = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for new_ending, old_ending in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        names = [name for name in old if name.endswith(new_ending)]
        assert names
        for name in names:
            old[name.removesuffix(new_ending) + old_ending] = old.pop(name)
    save_file(old, file, {"format": "pt"})
    assert torch.equal(load_model(tmp_path)(tokens), expected)
