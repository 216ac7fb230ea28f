"""Offloaded weights: accelerate's offload and dispatch, and its autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import nn
from torch.testing import assert_close

from tests.integration.builders import ELSEWHERE, decoder, encoder, encoder_decoder, holds_one_conversation, token_ids

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


@pytest.mark.slow
@pytest.mark.parametrize("options", ELSEWHERE.values(), ids=ELSEWHERE.keys())
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
    # A tied weight comes back under both of its names where accelerate places it by name.
    assert set(away) <= {name for name, parameter in model.named_parameters() if parameter.is_meta}


@pytest.mark.slow
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
    """Accelerate wraps the model's forward: `generate` continues a prompt that this forward has read."""
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
