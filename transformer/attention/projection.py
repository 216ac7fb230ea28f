"""Projections at the speed at which weights can be read, or multiplied.

PyTorch's linear of one float32 row over weights that are not in the CPU's cache reaches a third of the memory
bandwidth; the same product as a small batch of matrices reaches nearly all of it. For more rows oneDNN's linear is the
quicker one. The rule below is fixed by shape, dtype and device, so equal inputs give equal bits in every process.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from . import onednn

FEW_NUMBERS = 3072
"""Numbers in all rows together up to which slices pay, up to four times: they stay beside the core. For more oneDNN
does: 1.1 to 2.9 times for up to 16 rows, 1.1 to 1.2 for thousands (AMD EPYC, beside PyTorch's linear by MKL)."""

MANY_WEIGHTS = 1 << 17
"""Weights from which on either pays: smaller ones stay in the CPU's cache."""

COMPILED_WEIGHTS = 1 << 15
"""The same in a compiled step, whose own linear of one row does not keep up: a step in 16 to 20 instead of 50 ms."""

PARTS = 8
"""Slices of the output that are worked out side by side."""

Plain = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear."""


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """`projection(x)` for `x` [B, L, in], through the module itself wherever anything but its weights counts."""
    # The sizes first: in small models they say no at every step.
    if type(projection) is nn.Linear and _many(projection.out_features, projection.in_features) and _quietly(x):
        plain = _plain(projection)
        if plain is not None and _sliced(projection.out_features, x):
            return _product(*plain, x)
        if plain is not None and onednn.AVAILABLE and x.numel() and not torch.compiler.is_compiling():
            return onednn.linear(x, *plain)
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
    if first is None or len(linears) < len(projections):
        return None
    if not _many(rows, first.in_features) or not _sliced(rows, x) or not _quietly(x):
        return None
    plain = [each for each in map(_plain, linears) if each is not None]
    if len(plain) < len(linears) or not (_adjacent(plain) or lay_side_by_side(linears)):
        return None
    weight, bias = plain[0]
    joint = weight.as_strided((rows, first.in_features), (first.in_features, 1))
    return _product(joint, None if bias is None else bias.as_strided((rows,), (1,)), x)


@torch.no_grad()
def lay_side_by_side(linears: Sequence[nn.Linear]) -> bool:
    """Puts the weights of linears one after the other in memory; whether they then lie so.

    Seen from outside nothing changes: the parameters, their numbers and names are what they were. Weights that stand in
    two places, or in memory that processes share, stay where they are.
    """
    plain: list[Plain] = [(linear.weight, linear.bias) for linear in linears]
    weights, found = [weight for weight, _ in plain], [bias for _, bias in plain if bias is not None]
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
    return _adjacent(plain)


def _adjacent(plain: Sequence[Plain]) -> bool:
    """Whether weights, and biases, follow one another in one buffer; buffers of their own may do so by chance."""
    end, bias_end = 0, 0
    for weight, bias in plain:
        if end and (weight.data_ptr() != end or (0 if bias is None else bias.data_ptr()) != bias_end):
            return False
        end = weight.data_ptr() + weight.nbytes
        bias_end = 0 if bias is None else bias.data_ptr() + bias.nbytes
    weight, bias = plain[0]
    return _reaches(weight, end) and (bias is None or _reaches(bias, bias_end))


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


def _plain(linear: nn.Linear) -> Plain | None:
    """Weight and bias where nothing else counts; read where they are registered, a fifth of the cost of asking."""
    registered = linear._parameters
    weight = registered.get("weight")
    quiet = (
        type(weight) is nn.Parameter
        and weight.dtype is torch.float32
        and weight.is_cpu
        and weight.is_contiguous()
        and "bias" in registered
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
    )
    return (weight, registered["bias"]) if quiet and weight is not None else None


def _many(rows: int, width: int) -> bool:
    """Whether weights [rows, width] are many enough for anything but the linear to pay."""
    return rows * width >= (COMPILED_WEIGHTS if torch.compiler.is_compiling() else MANY_WEIGHTS)


def _sliced(rows: int, x: Tensor) -> bool:
    """Whether many weights [rows, width] are best cut into slices, for the tokens of `x` [B, L, width]."""
    tokens = x.shape[0] * x.shape[1]
    return rows % PARTS == 0 and (tokens == 1 or tokens * x.shape[2] <= FEW_NUMBERS)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    parts = weight.view(PARTS, -1, width)
    # The strides of the rows decide: as a transposed view it is quick, as a reshaped one slower than the linear.
    operand = x.contiguous().as_strided((PARTS, width, batch * length), (0, 1, width))
    out = torch.bmm(parts, operand) if bias is None else torch.baddbmm(bias.view(PARTS, -1, 1), parts, operand)
    if batch * length == 1:
        return out.view(1, 1, -1)
    return out.view(-1, batch * length).t().reshape(batch, length, -1)
