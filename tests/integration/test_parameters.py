"""Parameters: no call moves one, and shared memory stays shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, GroupQueryAttention, MultiHeadAttention

WIDTH = 256
"""So wide that its projections take the fast ways."""


def language_model(**options: object) -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(64, WIDTH, 4, 512, 2, **{"tied_embeddings": False, "attention_bias": True, **options})


def token_ids(rows: int = 1, length: int = 6) -> Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))


def addresses(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Where each parameter lies, and where the storage behind it begins."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {name: (p.data_ptr(), p.untyped_storage().data_ptr()) for name, p in parameters}


def decode(module: nn.Module, steps: int = 3) -> None:
    """Steps of one token in no_grad, which take the fast ways."""
    with torch.no_grad():
        for _ in range(steps):
            module(torch.ones(1, 1, WIDTH))


def flatten(module: nn.Module) -> Tensor:
    """Puts all parameters into one buffer, as flat optimisers and FSDP do."""
    parameters = list(module.parameters())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    begin = 0
    for parameter in parameters:
        parameter.data = flat[begin : begin + parameter.numel()].view_as(parameter)
        begin += parameter.numel()
    return flat


def read_and_write(model: DecoderOnlyTransformer) -> None:
    model(token_ids(2)).sum().backward()
    with torch.no_grad():
        model(token_ids(1, 1))
    model.generate(token_ids(), max_new_tokens=3)
    model.generate(token_ids(2), max_new_tokens=2, num_beams=2)
    list(model.stream(token_ids(), max_new_tokens=2))


@pytest.mark.parametrize("attention", ["mha", "mqa"])
def test_no_call_of_a_model_moves_a_parameter(attention: str) -> None:
    model = language_model(attention=attention).eval()
    objects, before = list(model.parameters()), addresses(model)
    read_and_write(model)
    assert addresses(model) == before
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))


def test_no_call_of_an_encoder_decoder_moves_a_parameter() -> None:
    torch.manual_seed(0)
    model = EncoderDecoderTransformer(64, 64, WIDTH, 4, 512, 2).eval()
    before = addresses(model)
    model(token_ids(), token_ids()).sum().backward()
    model.generate(token_ids(), max_new_tokens=3)
    assert addresses(model) == before


@pytest.mark.parametrize("use_kv_cache", [False, True])
def test_no_step_of_a_module_moves_a_parameter(use_kv_cache: bool) -> None:
    module = GroupQueryAttention(WIDTH, 8, 2, True, use_kv_cache).eval()
    before = addresses(module)
    decode(module)
    assert addresses(module) == before


def trained(samples: bool) -> Tensor:
    """The weights after three steps of an optimiser over one flat buffer, with or without samples in between."""
    model = language_model(norm="layer").eval()
    flat = flatten(model)
    for _ in range(3):
        if samples:
            model.generate(token_ids(), max_new_tokens=2)
        loss = F.cross_entropy(model(token_ids(2))[:, :-1].flatten(0, 1), token_ids(2)[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        flat -= 0.1 * torch.cat([gradient.reshape(-1) for gradient in gradients])
    assert torch.equal(flat, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    return flat


def test_training_over_a_flat_buffer_is_not_changed_by_samples() -> None:
    assert torch.equal(trained(samples=True), trained(samples=False))


def test_a_state_dict_taken_before_a_step_is_still_the_weights() -> None:
    module = MultiHeadAttention(WIDTH, 8).eval()
    state = module.state_dict()
    decode(module)
    for tensor in state.values():
        tensor.zero_()
    assert not any(bool(parameter.any()) for parameter in module.parameters())


def test_weights_over_numpy_arrays_follow_them() -> None:
    module = MultiHeadAttention(WIDTH, 8, bias=False).eval()
    arrays = {name: parameter.detach().numpy().copy() for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.data = torch.from_numpy(arrays[name])
    decode(module)
    arrays["v_proj.weight"] += np.float32(1.0)
    x = torch.ones(1, 1, WIDTH)
    with torch.no_grad():
        expected = F.linear(F.linear(x, torch.from_numpy(arrays["v_proj.weight"])), module.out_proj.weight)
        # A single token's attention is its own value.
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-3)


def test_weights_shared_by_two_modules_stay_shared() -> None:
    first, second = MultiHeadAttention(WIDTH, 8).eval(), MultiHeadAttention(WIDTH, 8).eval()
    second.k_proj = first.k_proj
    second.v_proj.weight = nn.Parameter(first.v_proj.weight.data)
    before = addresses(first), addresses(second)
    for _ in range(2):
        decode(first, 1)
        decode(second, 1)
    assert (addresses(first), addresses(second)) == before
    assert first.v_proj.weight.data_ptr() == second.v_proj.weight.data_ptr()


def test_a_graph_recorded_before_a_step_goes_backward_after_it() -> None:
    module, x = MultiHeadAttention(WIDTH, 8).eval(), torch.randn(1, 3, WIDTH)
    gradients = []
    for between in (lambda: None, lambda: decode(module)):
        module.zero_grad()
        loss = module(x).square().sum()
        between()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("make", [lambda: MultiHeadAttention(WIDTH, 8).eval(), lambda: language_model().eval()])
def test_weights_are_saved_and_loaded_by_safetensors_after_steps(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = make()
    if isinstance(module, DecoderOnlyTransformer):
        module.generate(token_ids(), max_new_tokens=3)
    else:
        decode(module)
    save_model(module, str(tmp_path / "model"))
    save_file(module.state_dict(), str(tmp_path / "state"))
    with torch.no_grad():
        expected = {name: parameter.clone() for name, parameter in module.named_parameters()}
        for parameter in module.parameters():
            parameter.zero_()
    load_model(module, str(tmp_path / "model"))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, expected[name])


def test_a_part_is_saved_alone(tmp_path: Path) -> None:
    """`torch.save` writes the whole storage behind a tensor: a weight within a joint one would take its neighbours."""
    module = MultiHeadAttention(WIDTH, 8).eval()
    sizes = []
    for name in ("before", "after"):
        torch.save(module.q_proj.state_dict(), tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
        decode(module)
    assert abs(sizes[1] - sizes[0]) < 1024
