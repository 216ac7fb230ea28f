"""Whole models of other libraries as references: random weights, copied to ours by a table of names, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from transformer.blocks import BlockStack


def fill(theirs: nn.Module, norm_weight: float = 1.0, seed: int = 0) -> None:
    """Every parameter at random, norms and biases included: norms of ones and zero biases would hide mistakes.

    `norm_weight`: what the weights of norms are drawn around.
    """
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(theirs.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        if parameter.ndim >= 2:
            drawn *= parameter.shape[-1] ** -0.5
        elif name.endswith("weight"):
            drawn = norm_weight + 0.3 * drawn
        with torch.no_grad():
            parameter.copy_(drawn)


def copy_weights(
    ours: BlockStack, theirs: nn.Module, layers: str, names: dict[str, str], others: dict[str, str]
) -> None:
    """From their modules to ours: `names`, our name to theirs, within each block and layer, `others` beside them.

    Every parameter of either side has to be in these tables, but for their embeddings.
    """
    of_layers = [(f"blocks.{index}.", f"{layers}.{index}.") for index in range(len(ours.blocks))]
    table = {own + name: other + names[name] for own, other in of_layers for name in names} | others
    for own, other in table.items():
        ours.get_submodule(own).load_state_dict(theirs.get_submodule(other).state_dict())
    for module, known in ((ours, table.keys()), (theirs, table.values())):
        left = {name.rpartition(".")[0] for name, _ in module.named_parameters()} - set(known)
        assert not [name for name in left if not name.startswith("embed")], f"not in the tables: {left}"


@contextmanager
def no_float32() -> Iterator[None]:
    """Where their code asks for float32 (norms, angles, some softmaxes, in a model of any dtype) it gets float64.

    A model of float64 is then float64 throughout, and equal formulas are equal to 1e-12. Ours never runs in here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
