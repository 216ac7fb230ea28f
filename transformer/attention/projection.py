"""Projections at the speed at which weights can be read, or multiplied.

PyTorch's linear of one float32 row over weights that are not in the CPU's cache reaches a third of the memory
bandwidth; the same product as a small batch of matrices reaches nearly all of it. For more rows oneDNN's linear is the
quicker one. The rule below is fixed by shape, dtype and device, so equal inputs give equal bits in every process.
"""

import torch
from torch import Tensor, nn

from ..plain import plain_weight
from ..tracing import is_compiling, is_traced
from . import private_operators

FEW_NUMBERS = 3072
"""Numbers in all rows together up to which slices pay, up to four times: they stay beside the core. For more oneDNN
does: 1.1 to 2.9 times for up to 16 rows, 1.1 to 1.2 for thousands (AMD EPYC, beside PyTorch's linear by MKL)."""

MANY_WEIGHTS = 1 << 17
"""Weights from which on either pays: smaller ones stay in the CPU's cache."""

COMPILED_WEIGHTS = 1 << 15
"""The same in a compiled step, whose own linear of one row does not keep up: a step in 16 to 20 instead of 50 ms."""

PARTS = 8
"""Slices of the output that are worked out side by side."""


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """`projection(x)` for `x` [B, L, in], through the module itself wherever anything but its weights counts."""
    # The sizes first: in small models they say no at every step.
    if type(projection) is nn.Linear and _is_large(projection) and _is_float32_cpu_inference(x):
        operands = _operands(projection, x)
        if operands is not None and _few_rows(operands[0], x):
            return _sliced(*operands, x)
        if operands is not None and private_operators.use_onednn() and not is_traced(x) and x.numel():
            return private_operators.onednn_linear(x, *operands)
    out: Tensor = projection(x)
    return out


def plain_linear_weight(projection: nn.Module) -> Tensor | None:
    """The weight of a plain `nn.Linear`: exactly that class, a float `nn.Parameter`, no hook and no other forward.

    None for every other module: what its dtype and device are, and what it does with its weights, it alone knows.
    """
    return plain_weight(projection, nn.Linear)


def _is_large(linear: nn.Linear) -> bool:
    """Whether the weights are so many that anything but the linear pays."""
    weights = linear.in_features * linear.out_features
    return weights >= MANY_WEIGHTS or (weights >= COMPILED_WEIGHTS and is_compiling())


def _is_float32_cpu_inference(x: Tensor) -> bool:
    """Whether `x` is a plain float32 tensor on the CPU, and neither gradients nor autocast are on."""
    return (
        type(x) is Tensor
        and x.dtype is torch.float32
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _operands(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias where the linear is plain and they go together with `x` [B, L, in]; else None."""
    weight = plain_linear_weight(linear)
    if weight is None or weight.dtype is not torch.float32 or not weight.is_cpu or not weight.is_contiguous():
        return None
    if x.ndim != 3 or x.shape[2] != weight.shape[1] or "bias" not in linear._parameters:
        return None
    bias = linear._parameters["bias"]
    plain = bias is None or (type(bias) is nn.Parameter and bias.dtype is torch.float32 and bias.is_cpu)
    return (weight, bias) if plain else None


def _few_rows(weight: Tensor, x: Tensor) -> bool:
    """Whether weights [out, in] are best cut into slices, for the tokens of `x` [B, L, in].

    While traced only in a compiled step, whose number of rows is known without a guard.
    """
    if weight.shape[0] % PARTS:
        return False
    tokens = x.shape[0] * x.shape[1]
    if not is_traced(x):
        return tokens == 1 or 0 < tokens * x.shape[2] <= FEW_NUMBERS
    if not is_compiling() or torch.compiler.is_exporting():
        return False
    # Imported here: it brings sympy along, which only compilers need.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    few = statically_known_true(tokens == 1) or statically_known_true(tokens * x.shape[2] <= FEW_NUMBERS)
    return few and statically_known_true(tokens > 0)


def _sliced(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    parts = weight.view(PARTS, -1, width)
    # The strides of the rows decide: as a transposed view it is quick, as a reshaped one slower than the linear.
    operand = x.contiguous().as_strided((PARTS, width, batch * length), (0, 1, width))
    out = torch.bmm(parts, operand) if bias is None else torch.baddbmm(bias.view(PARTS, -1, 1), parts, operand)
    if batch * length == 1:
        return out.view(1, 1, -1)
    return out.view(-1, batch * length).t().reshape(batch, length, -1)
