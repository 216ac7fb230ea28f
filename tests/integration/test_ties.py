"""Tied weights and initialisation: one parameter stays one in conversions, state dicts, copies and accelerate."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_model as load_deduplicated
from safetensors.torch import save_model as save_deduplicated
from torch import Tensor, nn

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, GroupQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock, FeedForward, GatedFeedForward, LayerNorm, RMSNorm
from transformer.checkpoints import load_model, save_model
from transformer.errors import ArgumentError, ConfigurationError
from transformer.models import EncoderTransformer, UMT5Model, t5_config, umt5_config
from transformer.positions import RelativePositionBias

VOCAB = 23
SHAPE = {"d_model": 16, "num_heads": 2, "d_ff": 20, "num_layers": 2}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def decoder_only(**options: object) -> DecoderOnlyTransformer:
    return DecoderOnlyTransformer(VOCAB, **SHAPE, **options).eval()


def encoder_decoder(**options: object) -> EncoderDecoderTransformer:
    return EncoderDecoderTransformer(VOCAB, VOCAB, **SHAPE, **options).eval()


def t5() -> EncoderDecoderTransformer:
    return EncoderDecoderTransformer.from_config(t5_config(VOCAB, 16, 2, 20, 2, head_dim=8)).eval()


def shared_but_own_head() -> EncoderDecoderTransformer:
    return encoder_decoder(shared_embeddings=True, tied_embeddings=False)


def umt5() -> UMT5Model:
    return UMT5Model(umt5_config(VOCAB, 16, 2, 20, 2, head_dim=8, tied_embeddings=True)).eval()


def relative() -> DecoderOnlyTransformer:
    return decoder_only(position="relative")


TIED = [decoder_only, encoder_decoder, t5, shared_but_own_head, umt5, relative]


def places(model: nn.Module) -> set[frozenset[str]]:
    """The names of each parameter that has several."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(each) for each in names.values() if len(each) > 1}


def read(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS) if isinstance(model, DecoderOnlyTransformer) else model(IDS, IDS[:, :4])


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def to_meta_and_back(model: nn.Module) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    return model


def assigned(model: nn.Module) -> nn.Module:
    fresh = on_meta(lambda: copy.deepcopy(model).to("meta"))
    fresh.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return fresh


def inside(model: nn.Module) -> nn.Module:
    """As `to_meta_and_back` of a module that has the model as a part."""
    return to_meta_and_back(nn.Sequential(model))[0]


DETOURS = {
    "to meta and back": to_meta_and_back,
    "inside another module": inside,
    "assigned": assigned,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "dtype": lambda model: model.double().float(),
}


@pytest.mark.parametrize("build", TIED)
@pytest.mark.parametrize("detour", DETOURS.values(), ids=DETOURS.keys())
def test_one_parameter_stays_one(build, detour):
    model = build()
    before, expected = places(model), read(model)
    assert before
    after = detour(model)
    assert places(after) == before
    assert torch.equal(read(after), expected)
    assert all(parameter.requires_grad for parameter in after.parameters())


def test_overwriting_conversions_keep_ties():
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model = t5()
        before = places(model)
        assert places(model.double()) == before
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_an_assigned_model_learns_and_is_saved_as_one_that_is_tied(tmp_path: Path):
    model = assigned(decoder_only()).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    optimizer.step()
    save_model(model.eval(), tmp_path / "saved")
    torch.testing.assert_close(read(load_model(tmp_path / "saved")), read(model), rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("build", TIED)
def test_a_state_dict_needs_one_of_a_tied_parameters_entries(build, assign):
    source, model = build(), build()
    before = places(model)
    for names in before:
        state = source.state_dict()
        for name in sorted(names)[1:]:
            del state[name]
        model.load_state_dict(state, assign=assign)
        assert places(model) == before
        assert torch.equal(read(model), read(source))
        assert len(state) == len(source.state_dict()) - len(names) + 1, "the caller's own is as it was"


@pytest.mark.parametrize("build", TIED)
def test_a_file_without_duplicates_loads(build, tmp_path):
    """safetensors expects the left-out entries among the missing ones."""
    source, model = build(), build()
    save_deduplicated(source, str(tmp_path / "model.safetensors"))
    assert load_deduplicated(model, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(read(model), read(source))


def test_missing_keys_are_named():
    model = decoder_only()
    state = model.state_dict()
    del state["decoder.norm.weight"], state["head.proj.weight"]
    assert model.load_state_dict(state, strict=False).missing_keys == ["decoder.norm.weight", "head.proj.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "decoder.norm.weight"\.'):
        model.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_entries_that_differ_are_refused_before_anything_is_loaded(assign):
    model, untied = decoder_only(), decoder_only(tied_embeddings=False)
    before = read(model)
    with pytest.raises(ArgumentError, match=r"embedding.tokens.weight and head.proj.weight .*tied_embeddings=False"):
        model.load_state_dict(untied.state_dict(), assign=assign)
    assert torch.equal(read(model), before)
    untied.load_state_dict(model.state_dict(), assign=assign)
    assert places(untied) == set()


def test_equal_nan_entries_are_equal():
    model = decoder_only()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("embedding.tokens.weight", "head.proj.weight"):
        state[name][0, 0] = float("nan")
    model.load_state_dict(state)
    assert model.head.proj.weight[0, 0].isnan()


def test_what_a_user_has_untied_stays_untied():
    model = decoder_only()
    model.head.proj.weight = nn.Parameter(model.head.proj.weight.detach().clone())
    assert places(assigned(to_meta_and_back(model))) == set()


@pytest.mark.parametrize("build", TIED)
def test_tie_weights_ties_what_the_configuration_ties(build):
    model = build()
    before = places(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(module, nn.Embedding):
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
    model.tie_weights()
    assert places(model) == before


def test_tie_weights_refuses_a_projection_that_has_no_weight_of_its_own():
    model = decoder_only()
    model.head.proj = nn.Sequential(nn.Linear(16, VOCAB))
    with pytest.raises(ConfigurationError, match=r"head.proj: expected a module with a weight"):
        model.tie_weights()


def test_an_adapter_around_a_tied_head_keeps_the_tie():
    model = decoder_only()
    adapted = get_peft_model(model, LoraConfig(target_modules=["head.proj"])).to("meta").to_empty(device="cpu")
    model.reset_parameters()
    assert model.head.proj.base_layer.weight is model.embedding.tokens.weight
    assert all(parameter.isfinite().all() for parameter in adapted.parameters())


# --- accelerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_buffers", [False, True])
@pytest.mark.parametrize("build", TIED)
def test_accelerate_loads_into_empty_weights(build, include_buffers, tmp_path):
    source = build()
    save_deduplicated(source, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    with init_empty_weights(include_buffers=include_buffers):
        model = build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert places(model) == places(source)
    model = load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}).eval()
    assert places(model) == places(source)
    assert torch.equal(read(model), read(source))


@pytest.mark.parametrize("build", [decoder_only, t5])
def test_the_head_owns_its_weight_by_name(build):
    """Hooks of offload put a weight in place only while the module that owns it runs."""
    model = build()
    expected = read(model)
    cpu_offload(model.head, execution_device=torch.device("cpu"))
    assert model.head.proj.weight.is_meta
    assert torch.equal(read(model), expected)


@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
def test_blocks_on_a_disk_run(build, tmp_path):
    source, model = build(), build()
    model.load_state_dict(source.state_dict())
    places = dict.fromkeys(model._modules, "cpu") | {"decoder": "disk"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert torch.equal(read(model), read(source))


# --- initialisation -------------------------------------------------------------------------------------------------


def attention() -> GroupQueryAttention:
    return GroupQueryAttention(16, 4, 2, True, position=RelativePositionBias(4), qk_norm=RMSNorm)


def decoder_block() -> DecoderBlock:
    return DecoderBlock(attention(), GatedFeedForward(16, 24), RMSNorm, cross_attention=GroupQueryAttention(16, 4, 2))


def encoder_block() -> EncoderBlock:
    return EncoderBlock(attention(), FeedForward(16, 24), LayerNorm, placement="both")


def stack() -> BlockStack:
    return BlockStack([decoder_block(), decoder_block()], RMSNorm(16, unit_offset=True))


def encoder() -> EncoderTransformer:
    options = {"position": "learned", "max_length": 9, "num_token_types": 2, "embedding_norm": True, "norm": "layer"}
    return EncoderTransformer(VOCAB, **SHAPE, **options)


def untied() -> DecoderOnlyTransformer:
    return decoder_only(tied_embeddings=False, norm_unit_offset=True, qk_norm=True, attention_bias=True)


def apply_to_all(module: nn.Module) -> None:
    """What scripts for sharded training do."""
    module.apply(lambda each: each.reset_parameters() if hasattr(each, "reset_parameters") else None)


EVERY_KIND = [*TIED, attention, decoder_block, encoder_block, stack, encoder, untied]
RESETS = {"reset_parameters": lambda module: module.reset_parameters(), "apply": apply_to_all}


@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS.keys())
@pytest.mark.parametrize("build", EVERY_KIND)
def test_a_materialised_module_is_as_newly_built(build, reset):
    """Every parameter is drawn, of the size that a new one has: within 5 standard errors of it."""
    fresh, module = build(), on_meta(build).to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, float("nan"))
    reset(module)
    assert places(module) == places(fresh)
    for (name, expected), (_, found) in zip(fresh.named_parameters(), module.named_parameters(), strict=True):
        assert found.isfinite().all(), name
        if expected.unique().numel() == 1:
            assert torch.equal(found, expected), name
            continue
        assert not torch.equal(found, expected), name
        spread = expected.std() * (expected.numel() / 2) ** -0.5
        assert abs(found.std() - expected.std()) < 5 * spread, name


def test_a_tied_table_is_drawn_at_the_embeddings_size():
    model = DecoderOnlyTransformer(2000, 64, 2, 8, 1)
    for reset in RESETS.values():
        reset(model)
        assert model.head.proj.weight is model.embedding.tokens.weight
        assert abs(model.embedding.tokens.weight.std() * 64**0.5 - 1) < 0.02


def test_a_module_that_cannot_be_initialised_is_named_before_anything_changes():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    network = nn.Sequential(nn.Linear(16, 16), Scale())
    block = DecoderBlock(attention(), network, RMSNorm)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"feed_forward\.1: expected a module with reset_parameters"):
        block.reset_parameters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
