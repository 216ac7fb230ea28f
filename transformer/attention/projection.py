"""A projection of few rows, at the speed at which its weights can be read.

PyTorch's linear of one float32 row over weights that are not in the CPU's cache reaches a third of the memory
bandwidth; the same product as a small batch of matrices reaches nearly all of it. The rule below is fixed by shape,
dtype and device, so equal inputs give equal bits in every process.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

if TYPE_CHECKING:
    from typing_extensions import Self

FEW_ROWS = 4
"""Rows up to which it pays; from 8 on both ways meet."""

MANY_WEIGHTS = 1 << 17
"""Weights from which on it pays: smaller ones stay in the CPU's cache."""

PARTS = 8
"""Slices of the output that are worked out side by side."""


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """`projection(x)` for `x` [B, L, in], through the module itself wherever anything but its weights counts."""
    # The sizes first: in small models they say no at every step.
    if (
        type(projection) is nn.Linear
        and _pays(projection.out_features, projection.in_features)
        and _few_rows(x)
        and _only_weights_count(projection)
    ):
        return _product(projection.weight, _bias(projection), x)
    out: Tensor = projection(x)
    return out


def project_together(projections: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """What all of these make of `x` [B, L, in], one beside the other in the last dimension, read as one matrix.

    None where they must be called one by one: anything but their weights counts, or these do not lie side by side.
    """
    linears = [linear for linear in projections if type(linear) is nn.Linear]
    rows, first = sum(linear.out_features for linear in linears), linears[0] if linears else None
    if first is None or len(linears) < len(projections) or not _pays(rows, first.in_features) or not _few_rows(x):
        return None
    end, bias_end = 0, 0
    for linear in linears:
        if not _only_weights_count(linear):
            return None
        weight, bias = linear.weight, _bias(linear)
        if end and (weight.data_ptr() != end or (0 if bias is None else bias.data_ptr()) != bias_end):
            return None
        end = weight.data_ptr() + weight.nbytes
        bias_end = 0 if bias is None else bias.data_ptr() + bias.nbytes
    joint, bias = first.weight.as_strided((rows, first.in_features), (first.in_features, 1)), _bias(first)
    return _product(joint, None if bias is None else bias.as_strided((rows,), (1,)), x)


class ReadsTogether(nn.Module, ABC):
    """A module some of whose linears read one input: their weights lie side by side in memory, also after any change.

    Equal weights then give equal bits whichever way the module came by them.
    """

    @abstractmethod
    def read_together(self) -> Sequence[nn.Module]:
        """The projections of that input, in order."""

    def lay_out(self) -> None:
        """Puts their weights side by side; nothing changes where they lie so."""
        lay_side_by_side(self.read_together())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.lay_out()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.lay_out()
        return self

    def _stay_laid_out(self) -> None:
        """To be called once there are projections."""
        self.register_load_state_dict_post_hook(_laid_out)  # type: ignore[no-untyped-call]
        self.lay_out()


def _laid_out(module: ReadsTogether, *_: object) -> None:
    module.lay_out()


@torch.no_grad()
def lay_side_by_side(projections: Sequence[nn.Module]) -> None:
    """Puts the weights of plain linears one after the other in memory, so that few rows may read them as one matrix.

    Seen from outside nothing changes: the parameters, their numbers and names are what they were. Weights of other
    dtypes and devices, which are not read so, stay where they are.
    """
    linears = [linear for linear in projections if type(linear) is nn.Linear]
    if len(linears) < len(projections):
        return
    for parameters in ([linear.weight for linear in linears], [_bias(linear) for linear in linears]):
        found = [p for p in parameters if type(p) is nn.Parameter and type(p.data) is Tensor and _reads_quickly(p)]
        alike = {(p.dtype, p.device, p.shape[1:], p.is_inference()) for p in found}
        if len(set(map(id, found))) < len(linears) or len(alike) > 1 or _adjacent(found):
            continue
        # Of the kind that they are: an inference tensor cannot be learnt on, any other must be.
        with torch.inference_mode(found[0].is_inference()):
            joint = torch.cat([parameter.data for parameter in found])
            for parameter, part in zip(found, torch.split(joint, [p.shape[0] for p in found]), strict=True):
                parameter.data = part


def _bias(linear: nn.Linear) -> Tensor | None:
    return linear.bias


def _adjacent(parameters: Sequence[Tensor]) -> bool:
    return all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(parameters))


def _few_rows(x: Tensor) -> bool:
    """Whether the quick way may pay, and only weights and `x` decide the result."""
    return (
        x.shape[0] * x.shape[1] <= FEW_ROWS
        and not torch.is_grad_enabled()
        and x.dtype is torch.float32
        and x.is_cpu
        and not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
        and not torch.is_autocast_enabled("cpu")
    )


def _only_weights_count(linear: nn.Linear) -> bool:
    weight = linear.weight
    return (
        _reads_quickly(weight)
        and weight.is_contiguous()
        and type(weight) is nn.Parameter
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
    )


def _reads_quickly(weight: Tensor) -> bool:
    return weight.dtype is torch.float32 and weight.is_cpu


def _pays(rows: int, width: int) -> bool:
    return rows * width >= MANY_WEIGHTS and rows % PARTS == 0


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    parts = weight.view(PARTS, -1, width)
    # The strides of the rows decide: as a transposed view it is quick, as a reshaped one slower than the linear.
    operand = x.contiguous().as_strided((PARTS, width, batch * length), (0, 1, width))
    out = torch.bmm(parts, operand) if bias is None else torch.baddbmm(bias.view(PARTS, -1, 1), parts, operand)
    if batch * length == 1:
        return out.view(1, 1, -1)
    return out.view(-1, batch * length).t().reshape(batch, length, -1)
