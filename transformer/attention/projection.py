"""A projection of few rows, at the speed at which its weights can be read.

PyTorch's linear of one float32 row over weights that are not in the CPU's cache reaches a third of the memory
bandwidth; the same product as a small batch of matrices reaches nearly all of it. The rule below is fixed by shape,
dtype and device, so equal inputs give equal bits in every process.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

FEW_ROWS = 4
"""Rows up to which it pays, up to four times; from 8 on both ways meet, and over weights in the cache it loses."""

MANY_WEIGHTS = 1 << 17
"""Weights from which on it pays: smaller ones stay in the CPU's cache."""

COMPILED_WEIGHTS = 1 << 15
"""The same in a compiled step, whose own linear of one row does not keep up: a step in 16 to 20 instead of 50 ms."""

MOST_WEIGHTS, MOST_ROWS = 1 << 24, 64
"""Weights from which on, as in a language model's head, it pays for any rows up to so many: 2.7 times for 8."""

PARTS = 8
"""Slices of the output that are worked out side by side."""


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """`projection(x)` for `x` [B, L, in], through the module itself wherever anything but its weights counts."""
    # The sizes first: in small models they say no at every step.
    if (
        type(projection) is nn.Linear
        and _pays(projection.out_features, projection.in_features, x)
        and _quietly(x)
        and _only_weights_count(projection)
    ):
        return _product(projection.weight, _bias(projection), x)
    out: Tensor = projection(x)
    return out


def project_together(projections: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """What all of these make of `x` [B, L, in], one beside the other in the last dimension, read as one matrix.

    None where they must be called one by one, as anything but their weights counts, or their sizes do not pay, or the
    step is compiled. Weights are laid side by side at the first step that asks for it: equal weights give equal bits
    whichever way they came.
    """
    if torch.compiler.is_compiling():
        # A compiler may not ask where weights lie; it starts each product at no cost.
        return None
    linears = [linear for linear in projections if type(linear) is nn.Linear]
    rows, first = sum(linear.out_features for linear in linears), linears[0] if linears else None
    if first is None or len(linears) < len(projections) or not _pays(rows, first.in_features, x) or not _quietly(x):
        return None
    if not all(map(_only_weights_count, linears)) or not (_adjacent(linears) or lay_side_by_side(linears)):
        return None
    joint, bias = first.weight.as_strided((rows, first.in_features), (first.in_features, 1)), _bias(first)
    return _product(joint, None if bias is None else bias.as_strided((rows,), (1,)), x)


@torch.no_grad()
def lay_side_by_side(linears: Sequence[nn.Linear]) -> bool:
    """Puts the weights of linears one after the other in memory; whether they then lie so.

    Seen from outside nothing changes: the parameters, their numbers and names are what they were. Weights that stand in
    two places, or in memory that processes share, stay where they are.
    """
    weights, biases = [linear.weight for linear in linears], [_bias(linear) for linear in linears]
    found = [bias for bias in biases if bias is not None]
    if len(set(map(id, weights))) < len(weights) or any(p.is_shared() for p in (*weights, *found)):  # type: ignore[no-untyped-call]
        return False
    for parameters in (weights, found):
        if len({(p.dtype, p.device, p.shape[1:], p.is_inference()) for p in parameters}) > 1:
            return False
    for parameters in (weights, found):
        if parameters:
            # Of the kind that they are: an inference tensor cannot be learnt on, any other must be.
            with torch.inference_mode(parameters[0].is_inference()):
                joint = torch.cat([parameter.data for parameter in parameters])
                for parameter, part in zip(parameters, torch.split(joint, [len(p) for p in parameters]), strict=True):
                    parameter.data = part
    return _adjacent(linears)


def _bias(linear: nn.Linear) -> Tensor | None:
    return linear.bias


def _adjacent(linears: Sequence[nn.Linear]) -> bool:
    """Whether weights, and biases, follow one another in one buffer; buffers of their own may do so by chance."""
    end, bias_end = 0, 0
    for linear in linears:
        weight, bias = linear.weight, _bias(linear)
        if end and (weight.data_ptr() != end or (0 if bias is None else bias.data_ptr()) != bias_end):
            return False
        end = weight.data_ptr() + weight.nbytes
        bias_end = 0 if bias is None else bias.data_ptr() + bias.nbytes
    first = linears[0]
    return _reaches(first.weight, end) and (not bias_end or _reaches(first.bias, bias_end))


def _reaches(tensor: Tensor, end: int) -> bool:
    storage = tensor.untyped_storage()
    return storage.data_ptr() + storage.nbytes() >= end


def _quietly(x: Tensor) -> bool:
    """Whether only weights and `x` decide the result, and nobody looks on."""
    return (
        not torch.is_grad_enabled()
        and x.dtype is torch.float32
        and x.is_cpu
        and not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
        and not torch.is_autocast_enabled("cpu")
    )


def _only_weights_count(linear: nn.Linear) -> bool:
    weight = linear.weight
    return (
        weight.dtype is torch.float32
        and weight.is_cpu
        and weight.is_contiguous()
        and type(weight) is nn.Parameter
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
    )


def _pays(rows: int, width: int, x: Tensor) -> bool:
    """Whether weights [rows, width] are many enough, and the tokens of `x` [B, L, width] of a number that is quick."""
    weights, tokens = rows * width, x.shape[0] * x.shape[1]
    if weights < (COMPILED_WEIGHTS if torch.compiler.is_compiling() else MANY_WEIGHTS) or rows % PARTS:
        return False
    return tokens <= (FEW_ROWS if weights < MOST_WEIGHTS else MOST_ROWS)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    parts = weight.view(PARTS, -1, width)
    # The strides of the rows decide: as a transposed view it is quick, as a reshaped one slower than the linear.
    operand = x.contiguous().as_strided((PARTS, width, batch * length), (0, 1, width))
    out = torch.bmm(parts, operand) if bias is None else torch.baddbmm(bias.view(PARTS, -1, 1), parts, operand)
    if batch * length == 1:
        return out.view(1, 1, -1)
    return out.view(-1, batch * length).t().reshape(batch, length, -1)
