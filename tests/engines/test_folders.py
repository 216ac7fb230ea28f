"""Folders of compositions: written by either side, loaded by both, refused where transformers cannot run them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from transformer.checkpoints import load_model, save_model
from transformer.engines import ModularForCausalLM, ModularModel, as_pretrained, from_pretrained_weights
from transformer.errors import ConfigurationError
from transformer.models import DecoderOnlyTransformer
from transformer.models.composition import composition_of

from .compositions import NAMES, VOCABULARY, model_of, options


def some_ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 11))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_saved_by_transformers(name: str, tmp_path: Path) -> None:
    """The Auto class and `load_model` read what `save_pretrained` writes."""
    model = model_of(name)
    as_pretrained(model).save_pretrained(tmp_path / "saved")
    ids = some_ids()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(theirs) is ModularForCausalLM
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=0)
    ours = load_model(tmp_path / "saved")
    torch.testing.assert_close(ours(ids), model(ids), atol=1e-6, rtol=0)
    assert composition_of(from_pretrained_weights(theirs)) == composition_of(model) == composition_of(ours)


OURS = ["mqa, untied, biases", "sinusoidal, after", "parts: everything differs", "both, offset, caps, windows"]


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_saved_by_this_library(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    save_model(model, tmp_path / "saved")
    ids = some_ids()
    engine = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(engine) is ModularForCausalLM
    torch.testing.assert_close(engine(ids).logits, model(ids), atol=1e-5, rtol=0)
    base = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(base) is ModularModel
    torch.testing.assert_close(base(ids).last_hidden_state, model.states(ids), atol=1e-5, rtol=0)
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) <= set(engine.state_dict())


@pytest.mark.parametrize("changes", [{"position": "alibi"}, {"window_size": 4, "num_sinks": 1}])
def test_folders_that_transformers_cannot_run_are_refused_by_name(changes: dict, tmp_path: Path) -> None:
    save_model(DecoderOnlyTransformer(**options(**changes)), tmp_path / "saved")
    for load in (AutoConfig, AutoModel, AutoModelForCausalLM):
        with pytest.raises(ConfigurationError, match=r"modular_attention_native.*load_model"):
            load.from_pretrained(tmp_path / "saved")


def test_a_new_model_of_a_configuration_is_initialised_as_ours() -> None:
    """Norms are neutral, and the tied table has the deviation that gives logits of about one."""
    model = model_of("both, offset, caps, windows")
    engine = AutoModelForCausalLM.from_config(as_pretrained(model).config)
    assert engine.lm_head.weight is engine.model.embed_tokens.weight
    assert engine.model.embed_tokens.weight.detach().std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert not engine.model.layers[0].input_layernorm.weight.any()
    plain = AutoModelForCausalLM.from_config(as_pretrained(model_of("rotary, mha")).config)
    assert bool((plain.model.norm.weight == 1).all())
    learned = AutoModelForCausalLM.from_config(as_pretrained(model_of("learned, layer norm, plain")).config)
    assert learned.model.embed_positions.weight.detach().std().item() == pytest.approx(1.0, rel=0.1)


def test_a_missing_tensor_is_initialised_and_the_others_are_not(tmp_path: Path) -> None:
    model = model_of("mqa, untied, biases")
    engine = as_pretrained(model)
    engine.save_pretrained(
        tmp_path / "saved", state_dict={k: v for k, v in engine.state_dict().items() if "k_proj" not in k}
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in engine.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]) == ("k_proj" not in name), name


@torch.no_grad()
def test_dtype_of_a_folder(tmp_path: Path) -> None:
    as_pretrained(model_of("rotary, mha").bfloat16()).save_pretrained(tmp_path / "saved")
    engine = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert engine.dtype is torch.bfloat16
    assert engine(some_ids()).logits.dtype is torch.bfloat16
