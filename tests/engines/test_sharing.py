"""Sharing of parameters between our models and the engines' modules, in both directions, and its refusals."""

import copy
import importlib
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from transformer import engines
from transformer.attention.conversion import to_gqa
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.checkpoints.families.modular import MODULAR
from transformer.engines import ModularForCausalLM, as_pretrained, from_pretrained_weights
from transformer.errors import ConfigurationError
from transformer.models import DecoderOnlyConfig, DecoderOnlyTransformer
from transformer.models.composition import Composition, LayerParts, composed, composition_of
from transformer.parallel import tensor_plan

from .compositions import NAMES, VOCABULARY, model_of, options, unsettled


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_shared_both_ways(name: str) -> None:
    model = model_of(name)
    ours = {id(parameter) for parameter in model.parameters()}
    engine = as_pretrained(model)
    assert {id(parameter) for parameter in engine.parameters()} == ours
    back = from_pretrained_weights(engine)
    assert {id(parameter) for parameter in back.parameters()} == ours
    assert composition_of(back) == composition_of(model)
    assert not list(engine.buffers())
    ids = torch.randint(VOCABULARY, (2, 9))
    torch.testing.assert_close(back(ids), model(ids))


def test_the_given_model_stays_as_it_is() -> None:
    model = model_of("gqa, llama3, qk_norm").train()
    model.head.proj.weight.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    names = [name for name, _ in model.named_modules()]
    engine = as_pretrained(model)
    assert engine.training
    assert not engine.lm_head.weight.requires_grad
    assert engine.lm_head.weight is engine.model.embed_tokens.weight
    assert [name for name, _ in model.named_modules()] == names
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not as_pretrained(model.eval()).training


def test_a_change_of_one_is_a_change_of_the_other() -> None:
    model = model_of("rotary, mha")
    engine = as_pretrained(model)
    ids = torch.randint(VOCABULARY, (1, 5))
    with torch.no_grad():
        engine.model.layers[0].mlp.up_proj.weight.mul_(2.0)
        torch.testing.assert_close(engine(ids).logits, model(ids))


def test_parts_that_are_plain_modules() -> None:
    """PyTorch's own embedding, head and norms."""
    block = DecoderBlock(
        model_of("rotary, mha").decoder.blocks[0].attention, GatedFeedForward(32, 48), nn.LayerNorm, placement="both"
    )
    stack = BlockStack([block], RMSNorm(32))
    model = DecoderOnlyTransformer.from_parts(nn.Embedding(7, 32), stack, nn.Linear(32, 7)).eval()
    engine = as_pretrained(model)
    ids = torch.randint(7, (2, 9))
    torch.testing.assert_close(engine(ids).logits, model(ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(from_pretrained_weights(engine)(ids), model(ids))


def test_a_changed_model_is_read_anew() -> None:
    model = model_of("rotary, mha")
    for block in model.decoder.blocks:
        block.attention = to_gqa(block.attention, 2)
    engine = as_pretrained(model.eval())
    ids = torch.randint(VOCABULARY, (2, 9))
    assert engine.config.num_key_value_heads == 2
    torch.testing.assert_close(engine(ids).logits, model(ids), atol=1e-5, rtol=0)


def test_weights_come_back_after_a_larger_vocabulary() -> None:
    model = model_of("rotary, mha")
    engine = as_pretrained(model)
    engine.resize_token_embeddings(VOCABULARY + 6)
    back = from_pretrained_weights(engine)
    assert back.config.vocab_size == VOCABULARY + 6
    ids = torch.randint(VOCABULARY + 6, (2, 9))
    torch.testing.assert_close(back(ids), engine(ids).logits, atol=1e-5, rtol=0)
    assert back.head is not None
    assert back.head.proj.weight is back.embedding.tokens.weight


@pytest.mark.parametrize("name", NAMES)
def test_plan_of_tensor_parallelism_is_that_of_our_model(name: str) -> None:
    model = model_of(name)
    engine = as_pretrained(model)
    ours = words_of(model, tensor_plan(model))
    expected = {MODULAR.stored_name(f"{path}.weight")[0].removesuffix(".weight"): word for path, word in ours.items()}
    found = words_of(engine, engine.tp_plan)
    found.setdefault("model.embed_tokens", "embedding_rowwise")  # transformers adds it; up to 5.19 only to tied models
    assert found == expected


def words_of(model: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """The word of each module that a plan names, where `*` is the number of a layer."""
    patterns = {path: re.sub(r"\.\d+\.", ".*.", path) for path, _ in model.named_modules()}
    words = {path: plan.get(path, plan.get(pattern)) for path, pattern in patterns.items()}
    return {path: word for path, word in words.items() if word is not None}


def test_a_window_of_one_token_beside_a_wider_one() -> None:
    one = DecoderOnlyConfig(**options(window_size=1, num_layers=1))
    layers = (LayerParts(one, None), LayerParts(replace(one, window_size=4), None))
    model = unsettled(composed(Composition(replace(one, num_layers=2), layers, None)))
    ids = torch.randint(VOCABULARY, (2, 9))
    expected = model.generate(ids, max_new_tokens=8, temperature=0.0)
    assert torch.equal(as_pretrained(model).generate(ids, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"position": "alibi"}, "alibi"),
        ({"position": "relative"}, "relative"),
        ({"window_size": 4, "num_sinks": 1}, "num_sinks"),
        ({"has_head": False}, "has_head"),
        ({"window_size": 1, "layer_pattern": "sliding full"}, "window_size"),
    ],
)
def test_what_engines_cannot_run_is_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        as_pretrained(DecoderOnlyTransformer(**options(**changes)))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class OwnModel(DecoderOnlyTransformer): ...


class OwnEngine(ModularForCausalLM): ...


def test_other_models_are_refused() -> None:
    model = model_of("rotary, mha")
    for other in (Wrapper(model), OwnModel(**options()), torch.compile(model, backend="eager"), nn.Linear(2, 2), None):
        with pytest.raises(ConfigurationError, match="model: expected a plain DecoderOnlyTransformer"):
            as_pretrained(other)


def test_other_engine_models_are_refused() -> None:
    engine = as_pretrained(model_of("rotary, mha"))
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ConfigurationError, match=r"expected a ModularForCausalLM, got Wrapper; .*model\.inner"):
        from_pretrained_weights(Wrapper(engine))
    for other in (OwnEngine(engine.config), theirs, model_of("rotary, mha"), None):
        with pytest.raises(ConfigurationError, match="expected a ModularForCausalLM"):
            from_pretrained_weights(other)


def test_replaced_modules_are_refused() -> None:
    class Quantised(nn.Linear): ...

    engine = as_pretrained(model_of("rotary, mha"))
    engine.model.layers[1].mlp.up_proj = Quantised(32, 48)
    with pytest.raises(ConfigurationError, match=r"expected Linear at model\.layers\.1\.mlp\.up_proj, got Quantised"):
        from_pretrained_weights(engine)


def test_other_tensors_are_refused() -> None:
    engine = as_pretrained(model_of("rotary, mha"))
    engine.lm_head.weight = nn.Parameter(torch.zeros(3, 32))
    with pytest.raises(ConfigurationError, match=r"lm_head\.weight"):
        from_pretrained_weights(engine)


def test_quantised_weights_are_refused() -> None:
    engine = as_pretrained(model_of("mqa, untied, biases"))
    quantize_(engine, Int8WeightOnlyConfig())
    with pytest.raises(ConfigurationError, match=r"q_proj\.weight .* in a Int8Tensor; .*without quantisation"):
        from_pretrained_weights(engine)


@pytest.mark.parametrize("path", ["", "decoder", "decoder.blocks.0", "decoder.blocks.0.attention.q_proj"])
@pytest.mark.parametrize("kind", ["hook", "pre_hook", "forward"])
def test_hooks_are_refused_as_the_result_would_not_run_them(path: str, kind: str) -> None:
    model = model_of("rotary, mha")
    module = model.get_submodule(path)
    if kind == "forward":
        module.forward = module.forward
    else:
        getattr(module, f"register_forward_{kind}")(lambda *_: None)
    named = re.escape(".".join(filter(None, ("model", path))))
    with pytest.raises(ConfigurationError, match=rf"^{named}: expected a module without hooks"):
        as_pretrained(model)


def test_a_config_that_was_changed_after_the_modules_is_refused() -> None:
    """Built of it anew, the model would have another window or epsilon, and so other logits."""
    engine = as_pretrained(model_of("none, windows"))
    for name, value in (("sliding_window", 2), ("rms_norm_eps", 0.5), ("logit_scale", 2.0)):
        before = getattr(engine.config, name)
        setattr(engine.config, name, value)
        with pytest.raises(ConfigurationError, match="one that was changed since"):
            from_pretrained_weights(engine)
        setattr(engine.config, name, before)
    engine.config.eos_token_id = 3
    assert from_pretrained_weights(engine).config.stop_tokens == (3,)


def test_a_head_that_was_untied_by_hand() -> None:
    engine = as_pretrained(model_of("rotary, mha"))
    engine.lm_head.weight = nn.Parameter(engine.lm_head.weight.detach() * 2.0)
    with pytest.raises(ConfigurationError, match=r"lm_head\.weight to be the table .*tie_word_embeddings to False"):
        from_pretrained_weights(engine)
    engine.config.tie_word_embeddings = False
    ids = torch.randint(VOCABULARY, (2, 9))
    torch.testing.assert_close(from_pretrained_weights(engine)(ids), engine(ids).logits, atol=1e-5, rtol=0)


def test_importing_again_registers_again() -> None:
    importlib.reload(engines)
    assert AutoConfig.for_model("modular_attention").model_type == "modular_attention"
