"""A model in one process beside the same model that ranks share."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from transformer import DecoderOnlyTransformer
from transformer.blocks import RMSNorm
from transformer.parallel import parallelize

V = 61
"""Tokens of the vocabulary: no number of ranks divides them."""

CLOSE = 2e-6
"""Largest difference between one process and several, in float32."""

OPTIONS: dict[str, dict] = {
    "mha, rotary, plain": {
        "feed_forward": "plain",
        "feed_forward_bias": True,
        "attention_bias": True,
        "residual_scale": 0.4,
    },
    "gqa, gated, qk_norm": {"attention": "gqa", "num_groups": 4, "qk_norm": True},
    "gqa, norms of all heads": {
        "attention": "gqa",
        "num_groups": 4,
        "qk_norm": True,
        "qk_norm_per_head": False,
        "norm_placement": "branch",
        "residual_scale": 0.4,
    },
    "tied, layer norms": {"norm": "layer", "tied_embeddings": True, "embedding_scale": 3.0},
    "window and sinks": {"window_size": 5, "num_sinks": 2, "layer_pattern": "sliding full"},
    "alibi, soft caps": {"position": "alibi", "softcap": 5.0, "logit_softcap": 9.0, "logit_scale": 0.5},
    "relative, both norms": {"position": "relative", "norm_placement": "both"},
    "relative per layer, qk_norm": {"position": "relative", "relative_per_layer": True, "qk_norm": True},
    "learned, unit offset": {"position": "learned", "max_length": 64, "norm_unit_offset": True},
    "parallel residual": {"residual": "parallel", "norm": "layer", "rotary_dim": 2},
    "parallel residual, one norm": {"residual": "parallel_one_norm", "attention": "gqa", "num_groups": 4},
    "sinusoidal, after": {
        "position": "sinusoidal",
        "norm_placement": "after",
        "norm": "layer",
        "embedding_norm": True,
        "head_bias": True,
    },
}


def mesh_of(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,))


def unsettled(model: nn.Module) -> nn.Module:
    """The model with all its parameters drawn anew, so that no bias or norm is 0 or 1."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5, generator=generator)
    return model


def decoder(**options: object) -> DecoderOnlyTransformer:
    model = DecoderOnlyTransformer(V, 32, 8, 48, 2, **options)
    unsettled(model)
    return model


def both(make: Callable[[], nn.Module], mesh: DeviceMesh, **options: bool) -> tuple[nn.Module, nn.Module]:
    """A model, and the same one shared by the ranks."""
    whole = make()
    return whole, parallelize(copy.deepcopy(whole), mesh, **options)


def full(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_gradients(whole: nn.Module, shared: nn.Module, close: float = CLOSE) -> None:
    """Gradients are DTensors of the global shape, equal to those of one process relative to the largest of each."""
    expected, found = dict(whole.named_parameters()), dict(shared.named_parameters())
    assert expected.keys() == found.keys()
    for name, parameter in expected.items():
        assert found[name].shape == parameter.shape, name
        gradient = found[name].grad
        assert gradient is not None, name
        assert gradient.shape == parameter.shape, name
        scale = max(1.0, parameter.grad.abs().max().item())
        wanted, numbers = parameter.grad / scale, full(gradient) / scale
        assert torch.allclose(numbers, wanted, atol=close, rtol=0), (name, (numbers - wanted).abs().max())


def assert_equal_on_ranks(tensor: Tensor) -> None:
    """Every rank has the same bits."""
    tensors: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(tensors, tensor.detach())
    assert all(torch.equal(tensors[0], each) for each in tensors)


def norm_of_heads(dim: int) -> RMSNorm:
    return RMSNorm(dim)
