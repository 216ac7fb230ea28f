"""Weights that are elsewhere, or other than plain floats, while a model runs: offload, casts and integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.testing import assert_close

from tests.company.builders import decoder, encoder, encoder_decoder, token_ids, vectors
from transformer import MultiHeadAttention
from transformer.errors import DeviceError, DtypeError

CPU = torch.device("cpu")

# Of a module that two names share, accelerate wants both names in its map, and warns of one of them.
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")


def split(model: nn.Module, folder: Path) -> nn.Module:
    """The first block of each stack on the processor, the others on the disk."""
    # Not `named_children`, which names a shared child once.
    places = {name: "cpu" for name, child in model._modules.items() if child is not None}
    for name, child in model.named_modules():
        if isinstance(child, nn.ModuleList):
            stack = name.removesuffix(".blocks")
            places.pop(stack)
            places.update({f"{name}.{index}": "disk" if index else "cpu" for index in range(len(child))})
            places[f"{stack}.norm"] = "cpu"
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def at_the_root(model: nn.Module, folder: Path) -> nn.Module:
    """One hook puts every weight in place before the model's forward, and takes them away after it."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights, place_submodules=True)
    return add_hook_to_module(model, hook)


WHOLE = {"blocks": ["EncoderBlock", "DecoderBlock"], "attentions": ["MultiHeadAttention", "GroupQueryAttention"]}
OFFLOADS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "cpu, whole blocks": lambda model, folder: cpu_offload(model, CPU, preload_module_classes=WHOLE["blocks"]),
    "cpu, whole attentions": lambda model, folder: cpu_offload(
        model, CPU, offload_buffers=True, preload_module_classes=WHOLE["attentions"]
    ),
    "disk": lambda model, folder: disk_offload(model, folder, CPU),
    "split": split,
    "root": at_the_root,
}
DECODERS = {
    "small": {"attention": "gqa", "num_groups": 2, "qk_norm": True},
    "of 512": {"d_model": 512, "attention": "gqa", "num_groups": 2},
    "untied": {"tied_embeddings": False, "attention_bias": True, "window_size": 4, "num_sinks": 1},
    "relative": {"position": "relative"},
    "learned": {"position": "learned", "max_length": 40},
}


def holds_one_conversation(model: nn.Module, plain: nn.Module) -> None:
    """Two turns by forward and generate, as the plain model has them."""
    ids = token_ids(2, 9)
    said = []
    for each in (model, plain):
        each.enable_cache()
        with torch.no_grad():
            logits = [each(ids[:, :4]), each(ids[:, 4:5])]
        said.append(
            (*logits, each.generate(ids[:, 5:7], max_new_tokens=3), each.generate(ids[:, 7:], max_new_tokens=3))
        )
        assert each.kv_cache.length == 15
        each.disable_cache()
    assert_close(said[0][:2], said[1][:2], atol=1e-5, rtol=0)
    assert torch.equal(said[0][2], said[1][2])
    assert torch.equal(said[0][3], said[1][3])


@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS.keys())
@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_decoder(offload: str, options: dict, tmp_path: Path) -> None:
    plain, model = decoder(**options), OFFLOADS[offload](decoder(**options), tmp_path)
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert away
    ids = token_ids(2, 7)
    with torch.no_grad():
        for given in (ids, ids[:1, :1], ids[:, :3]):
            assert_close(model(given), plain(given), atol=1e-5, rtol=0)
    for prompt in (ids, ids[:1]):
        expected = plain.generate(prompt, max_new_tokens=6)
        assert torch.equal(model.generate(prompt, max_new_tokens=6), expected)
        assert torch.equal(model.generate(prompt, max_new_tokens=6, use_cache=False), expected)
    assert torch.equal(
        torch.stack(list(model.stream(ids, max_new_tokens=6)), 1), plain.generate(ids, max_new_tokens=6)[:, 7:]
    )
    holds_one_conversation(model, plain)
    assert [name for name, parameter in model.named_parameters() if parameter.is_meta] == away


@pytest.mark.parametrize("options", [{}, {"d_model": 512}, {"shared_embeddings": True, "position": "relative"}])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_encoder_decoder(offload: str, options: dict, tmp_path: Path) -> None:
    plain, model = encoder_decoder(**options), OFFLOADS[offload](encoder_decoder(**options), tmp_path)
    source, target = token_ids(2, 6), token_ids(2, 5, seed=1)
    with torch.no_grad():
        assert_close(model(source, target), plain(source, target), atol=1e-5, rtol=0)
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        expected = plain.generate(source, max_new_tokens=6, **options)
        assert torch.equal(model.generate(source, max_new_tokens=6, **options), expected)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_encoder(offload: str, tmp_path: Path) -> None:
    plain, model = encoder(), OFFLOADS[offload](encoder(), tmp_path)
    with torch.no_grad():
        assert_close(model(token_ids(2, 6)), plain(token_ids(2, 6)), atol=1e-5, rtol=0)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_autocast_around_every_step(accelerator: Accelerator) -> None:
    """Accelerate wraps the model's forward: a prompt that forward read is one that generate goes on from."""
    model, plain, ids = accelerator.prepare(decoder()).eval(), decoder(), token_ids(2, 8)
    seen: list[torch.dtype] = []
    model.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.no_grad():
        assert_close(model(ids), plain(ids), atol=0.05, rtol=0)
    model.generate(ids, max_new_tokens=4)
    assert len(seen) == 1 + 4
    model.enable_cache()
    with torch.no_grad():
        model(ids[:, :6])
        said = model.generate(ids[:, 6:], max_new_tokens=4)
        assert model.kv_cache.length == 12
        logits = model(said[:, -1:])
        assert_close(logits, plain(torch.cat((ids[:, :6], said, said[:, -1:]), 1))[:, -1:], atol=0.05, rtol=0)
    # A conversation that goes on has read the last token too.
    assert seen == [torch.float32] * (1 + 4 + 1 + 5 + 1)


# --- weights that are no plain floats ---------------------------------------------------------------------------------


class IntegerLinear(nn.Linear):
    """A linear of int8 weights with a scale for each row, as bitsandbytes keeps them."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = plain.bias

    def whole(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole().to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """A linear of two four-bit numbers in each byte, and without a `weight` at all."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 7
        numbers = (plain.weight.detach() / scale).round().add(8).to(torch.uint8)
        self.register_buffer("packed", numbers[:, ::2] * 16 + numbers[:, 1::2])
        self.register_buffer("scale", scale)

    def whole(self) -> Tensor:
        pairs = torch.stack((self.packed // 16, self.packed % 16), -1)
        return (pairs.flatten(1).float() - 8) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole(), self.bias)


class CastingLinear(nn.Linear):
    """A linear of bfloat16 weights that takes and gives float32."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.weight, self.bias = nn.Parameter(plain.weight.detach().bfloat16()), plain.bias

    def whole(self) -> Tensor:
        return self.weight.float()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole(), self.bias)


class CastByHooks(nn.Linear):
    """A plain linear that lies in eight bits, and is made wide by hooks for the time of its own forward."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.weight, self.bias = nn.Parameter(plain.weight.detach().to(torch.float8_e4m3fn)), plain.bias
        self.register_forward_pre_hook(lambda module, given: module.hold(torch.float32))
        self.register_forward_hook(lambda module, given, out: module.hold(torch.float8_e4m3fn))

    def hold(self, dtype: torch.dtype) -> None:
        self.weight.data = self.weight.data.to(dtype)

    def whole(self) -> Tensor:
        return self.weight.float()


def with_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Every linear but the head, whose weight is the embedding's, made another."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "proj":
                setattr(module, name, make(child))
    return model.eval()


def plain_again(linear: nn.Module) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    plain.weight, plain.bias = nn.Parameter(linear.whole().detach().clone()), linear.bias
    return plain


LINEARS = [IntegerLinear, PackedLinear, CastingLinear, CastByHooks]


@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS.keys())
@pytest.mark.parametrize("linear", LINEARS)
def test_a_decoder_of_other_linears(linear: type, options: dict) -> None:
    """As a model of plain linears with the very weights that they stand for."""
    model = with_linears(decoder(**options), linear)
    plain = with_linears(decoder(**options), lambda each: plain_again(linear(each)))
    ids = token_ids(2, 7)
    with torch.no_grad():
        for given in (ids, ids[:1, :1]):
            assert_close(model(given), plain(given), atol=1e-5, rtol=0)
    expected = plain.generate(ids, max_new_tokens=6)
    assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=6, use_cache=False), expected)
    holds_one_conversation(model, plain)


@pytest.mark.parametrize("linear", LINEARS)
def test_an_encoder_decoder_of_other_linears(linear: type) -> None:
    """Its source is projected by them too, and kept."""
    model = with_linears(encoder_decoder(), linear)
    plain = with_linears(encoder_decoder(), lambda each: plain_again(linear(each)))
    source = token_ids(2, 6)
    for options in ({}, {"use_cache": False}):
        expected = plain.generate(source, max_new_tokens=6, **options)
        assert torch.equal(model.generate(source, max_new_tokens=6, **options), expected)


# --- plain weights ----------------------------------------------------------------------------------------------------


def test_plain_weights_still_tell_what_is_wrong() -> None:
    module, x = MultiHeadAttention(32, 4), vectors(1, 3)
    with pytest.raises(DtypeError, match=r"^x: expected torch.float32, as the module's weights, got torch.float64"):
        module(x.double())
    with pytest.raises(DeviceError, match=r"^x: expected a tensor on cpu, as the module's weights, got meta"):
        module(x.to("meta"))
    with pytest.raises(DtypeError, match=r"^kv: expected"):
        module(x, x.bfloat16())
