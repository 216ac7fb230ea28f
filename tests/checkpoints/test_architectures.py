"""Architectures in a folder: decoders without a head, encoders, and those that are refused by name."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.checkpoints.folders import edit_config, edit_tensors
from tests.checkpoints.test_bert import CONFIG as BERT
from tests.checkpoints.test_encoders import ROBERTA
from tests.checkpoints.test_t5 import CASES as T5_CASES
from tests.checkpoints.theirs import CASES, ids
from tests.peers.models import fill
from transformer import DecoderOnlyTransformer
from transformer.checkpoints import load_config, load_model, save_model
from transformer.errors import ArgumentError, ConfigurationError, FileFormatError
from transformer.models import EncoderTransformer

HEADLESS = {
    "LlamaModel": CASES["llama"],
    "MistralModel": CASES["mistral"],
    "Qwen2Model": CASES["qwen2, windows"],
    "Qwen3Model": CASES["qwen3"],
    "MixtralModel": CASES["mixtral"],
    "Qwen3MoeModel": CASES["qwen3_moe"],
    "GemmaModel": CASES["gemma, untied"],
    "GPT2Model": CASES["gpt2, untied"],
    "PhiModel": CASES["phi"],
    "StableLmModel": CASES["stablelm"],
    "Starcoder2Model": CASES["starcoder2, no biases"],
    "GPTNeoXModel": CASES["gpt_neox"],
    "FalconModel": CASES["falcon, grouped"],
    "OPTModel": CASES["opt, after"],
    "BloomModel": CASES["bloom, six heads"],
}
TIED = {
    "LlamaModel": CASES["llama, tied"],
    "MistralModel": CASES["mistral, no window"],
    "Qwen2Model": CASES["qwen2, tied"],
    "Qwen3Model": CASES["qwen3, biases"],
    "GemmaModel": CASES["gemma"],
    "Gemma2Model": CASES["gemma2"],
    "GPT2Model": CASES["gpt2"],
    "GPTNeoXModel": CASES["gpt_neox, sequential"],
    "FalconModel": CASES["falcon"],
    "OPTModel": CASES["opt"],
    "BloomModel": CASES["bloom"],
}
BARE = [(name, config) for cases in (HEADLESS, TIED) for name, config in cases.items()]
ALIKE = {"MT5EncoderModel": "T5EncoderModel", "MistralModel": "LlamaModel"}
ENCODERS = {
    ("T5EncoderModel", "t5"),
    ("T5EncoderModel", "t5 1.1, one table"),
    ("MT5EncoderModel", "mt5"),
    ("UMT5EncoderModel", "umt5"),
}
OTHERS = {
    "LlamaForSequenceClassification": (CASES["llama"], "score.weight"),
    "GPT2ForTokenClassification": (CASES["gpt2"], "classifier.weight"),
    "BertForMultipleChoice": (BERT, "classifier.weight"),
    "RobertaForQuestionAnswering": (ROBERTA, "qa_outputs.weight"),
    "BertForQuestionAnswering": (BERT, "qa_outputs.weight"),
    "BertForNextSentencePrediction": (BERT, "cls.seq_relationship.weight"),
    "T5ForSequenceClassification": (T5_CASES["t5"][0], "classification_head"),
}


def saved(architecture: str, config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    model = getattr(transformers, architecture)(deepcopy(config)).eval()
    fill(model, 0.0 if config.model_type.startswith("gemma") else 1.0)
    model.save_pretrained(folder)
    return model


def states(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(tokens, attention_mask=mask).last_hidden_state


@torch.no_grad()
def written_back(ours: torch.nn.Module, theirs: PreTrainedModel, folder: Path) -> None:
    """Read by transformers as what it is."""
    save_model(ours, folder)
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    # By every number an encoder of mT5 is one of T5, and a Mistral without a window a Llama.
    assert architecture in {type(theirs).__name__, ALIKE.get(type(theirs).__name__)}
    tokens = ids(2, 9)
    again = getattr(transformers, architecture).from_pretrained(folder).eval()
    assert torch.equal(states(again, tokens), states(theirs, tokens))
    assert torch.equal(load_model(folder)(tokens), ours(tokens))
    assert load_config(folder) == ours.config


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "config"), BARE)
@torch.no_grad()
def test_a_decoder_without_a_head_gives_states(architecture: str, config: PreTrainedConfig, tmp_path: Path) -> None:
    theirs = saved(architecture, config, tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert type(ours) is DecoderOnlyTransformer
    assert ours.config.has_head is False
    tokens = ids(2, 14)
    expected = states(theirs, tokens)
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=2e-5)
    ours.enable_cache()
    parts = [ours(part) for part in tokens.split([9, 1, 4], 1)]
    ours.disable_cache()
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2e-5)
    for generation in (ours.generate, ours.stream):
        with pytest.raises(ArgumentError, match="expected a model with a head, got one with has_head=False"):
            generation(tokens, max_new_tokens=2)
    written_back(ours, theirs, tmp_path / "ours")


def test_without_a_head_there_is_nothing_to_tie() -> None:
    model = DecoderOnlyTransformer(11, 8, 2, 12, 2, has_head=False)
    assert not [name for name in model.state_dict() if "head" in name]
    model.to_empty(device="cpu").reset_parameters()
    model.tie_weights()
    assert model(ids(1, 5) % 11, logits_to_keep=2).shape == (1, 2, 8)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TIED)
@pytest.mark.parametrize("named", [True, False])
@torch.no_grad()
def test_bare_names_of_tensors_do_not_take_a_head_away(architecture: str, named: bool, tmp_path: Path) -> None:
    """The first GPT-2 has the tensors of `GPT2Model` in a folder of `GPT2LMHeadModel`."""
    theirs = saved(architecture, TIED[architecture], tmp_path)
    whole = "GPT2LMHeadModel" if architecture == "GPT2Model" else architecture.replace("Model", "ForCausalLM")
    edit_config(tmp_path, architectures=[whole] if named else None)
    ours, tokens = load_model(tmp_path), ids(2, 9)
    torch.testing.assert_close(ours.states(tokens), states(theirs, tokens), rtol=0, atol=2e-5)
    expected = getattr(transformers, whole).from_pretrained(tmp_path).eval()(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=2e-4)


def test_a_bare_model_with_a_head_is_told_as_what_it_is_named(tmp_path: Path) -> None:
    saved("LlamaForCausalLM", CASES["llama"], tmp_path)
    edit_config(tmp_path, architectures=["LlamaModel"])
    with pytest.raises(FileFormatError, match=r"tensors of LlamaModel, .* got others. unknown: lm_head.weight$"):
        load_model(tmp_path)


@pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertForMaskedLM"])
@torch.no_grad()
def test_heads_of_pre_training_are_dropped(architecture: str, tmp_path: Path) -> None:
    """The published BERT has both heads, and names its masked language model alone."""
    theirs = saved("BertForPreTraining", BERT, tmp_path)
    edit_config(tmp_path, architectures=[architecture])
    tokens = ids(2, 9)
    expected = theirs.base_model(tokens).last_hidden_state
    torch.testing.assert_close(load_model(tmp_path)(tokens), expected, rtol=0, atol=2e-5)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("bert.embeddings.word_embeddings.weight"))
    with pytest.raises(FileFormatError, match=rf"tensors of {architecture}, .* got others. missing: bert"):
        load_model(tmp_path)


def test_a_head_that_is_lost_is_missed(tmp_path: Path) -> None:
    saved("LlamaForCausalLM", CASES["llama"], tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(FileFormatError, match=r"expected the tensors of LlamaForCausalLM.* missing: lm_head.weight$"):
        load_model(tmp_path)


@pytest.mark.parametrize(("architecture", "case"), sorted(ENCODERS))
@torch.no_grad()
def test_an_encoder_alone(architecture: str, case: str, tmp_path: Path) -> None:
    theirs = saved(architecture, T5_CASES[case][0], tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert type(ours) is EncoderTransformer
    tokens, mask = ids(2, 14), torch.tensor([[1] * 14, [1] * 9 + [0] * 5])
    expected = states(theirs, tokens, mask)
    torch.testing.assert_close(ours(tokens, mask)[mask == 1], expected[mask == 1], rtol=0, atol=2e-5)
    written_back(ours, theirs, tmp_path / "ours")
    half = load_model(tmp_path / "theirs", torch.float16)
    assert {each.dtype for each in half.parameters()} == {torch.float16, torch.float32}
    edit_config(tmp_path / "theirs", is_encoder_decoder=True)
    edit_tensors(tmp_path / "theirs", lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}))
    assert torch.equal(load_model(tmp_path / "theirs")(tokens, mask), ours(tokens, mask))


@pytest.mark.parametrize(("architecture", "case"), [("T5Model", "t5"), ("MT5Model", "mt5"), ("UMT5Model", "umt5")])
def test_an_encoder_decoder_without_a_head_is_refused(architecture: str, case: str, tmp_path: Path) -> None:
    """Its table would become a head that was never trained as one; the same tensors by another name are loaded."""
    saved(architecture, deepcopy(T5_CASES[case][0]), tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    for load in (load_config, load_model):
        with pytest.raises(
            ConfigurationError, match=rf"architectures: expected a model with a head.* got .*{architecture}"
        ):
            load(tmp_path)
    edit_config(tmp_path, architectures=["T5WithLMHeadModel"])
    load_model(tmp_path)


@pytest.mark.parametrize("architecture", OTHERS)
def test_any_other_is_refused_by_one_sentence_with_its_name(architecture: str, tmp_path: Path) -> None:
    config, tensor = OTHERS[architecture]
    saved(architecture, config, tmp_path)
    expected = rf"^{tmp_path}: expected the tensors of .* got those of architectures={architecture}, .*{tensor}"
    with pytest.raises(FileFormatError, match=expected) as said:
        load_model(tmp_path)
    assert len(str(said.value)) < 1000
