"""Linear projections on the CPU, at the speed at which weights can be read, or multiplied.

PyTorch's linear of few rows over weights that are not in the CPU's cache reaches a third of the memory bandwidth. A
compiled kernel reaches nearly all of it, in every dtype. Where it is not used a float32 row is multiplied as a small
batch of matrices, and more rows by oneDNN's linear; several wide rows are even where there is one, since PyTorch
multiplies them at the processor's full rate.

Shape, dtype, device and the thresholds of `tuning` decide, and what a process or a call may set: whether numba is
installed and `MODULAR_ATTENTION_COMPILED` is not 0, a dispatch mode, `backend(...)`, gradients, autocast, hooks. Where
all of these are the same, equal inputs give equal bits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

from ..plain import LINEAR_CALL, LINEAR_FORWARD, plain_weight
from ..tracing import is_compiling, is_traced
from . import private_operators, tuning
from .few_rows import project_few_rows
from .linear_weights import LinearWeight


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """`projection(x)` for `x` [B, L, in], through the module itself wherever anything but its weights counts."""
    if type(projection) is nn.Linear:
        # The size first: small weights, which are in the CPU's cache, need no other question.
        weights, limits = projection.in_features * projection.out_features, tuning.active
        weight = projection._parameters.get("weight")
        wide = x.dtype is torch.float32 and type(weight) is nn.Parameter
        least = limits.min_few_rows_weights if wide else limits.min_half_few_rows_weights
        if weights >= least and (outs := project_few_rows((projection,), x)) is not None:
            return outs[0]
        large = weights >= limits.min_linear_weights
        if (large or (weights >= limits.min_compiled_linear_weights and is_compiling())) and is_plain_float32_cpu(x):
            operands = _operands(projection, x)
            if operands is not None and _use_slices(operands[0], x):
                return _sliced(*operands, x)
            # oneDNN's linear has no derivatives, also where only tangents are carried along.
            eager = forward_ad._current_level < 0 and not is_traced(x)
            if operands is not None and private_operators.use_onednn() and eager and x.numel():
                return private_operators.onednn_linear(x, *operands)
        if not (
            torch.is_grad_enabled()
            or torch.compiler.is_dynamo_compiling()
            or weight is None
            or "bias" not in projection._parameters
            or projection._forward_hooks
            or projection._forward_pre_hooks
            or "forward" in projection.__dict__
            or global_hooks._global_forward_hooks
            or global_hooks._global_forward_pre_hooks
            # Adapters and tracers replace these of the class.
            or nn.Linear.forward is not LINEAR_FORWARD
            or nn.Linear.__call__ is not LINEAR_CALL
        ):
            # What the call of the module comes to; half of the time of a small product goes into getting there.
            return F.linear(x, weight, projection._parameters["bias"])
    out: Tensor = projection(x)
    return out


def project_together(projections: tuple[nn.Module, ...], x: Tensor) -> list[Tensor]:
    """`projection(x)` of several modules that read the same `x` [B, L, in]: in one call where a kernel can."""
    share, limits = 0.0, tuning.active
    for projection in projections:
        if type(projection) is not nn.Linear:
            break
        wide = x.dtype is torch.float32 and type(projection._parameters.get("weight")) is nn.Parameter
        least = limits.min_few_rows_weights if wide else limits.min_half_few_rows_weights
        share += projection.in_features * projection.out_features / max(least, 1)
    else:
        # Together they are large enough: they share a call.
        if share >= 1.0 and (outs := project_few_rows(projections, x)) is not None:
            return outs
    projected = []
    for projection in projections:
        projected.append(project(projection, x))  # noqa: PERF401 (a comprehension is one more call)
    return projected


def multiply_together(weights: Sequence[LinearWeight], x: Tensor) -> list[Tensor]:
    """`F.linear` of `x` [B, L, in] by each of several float weights, which no module has, as quick as by modules."""
    limits, number = tuning.active, sum(weight.numbers.numel() for weight in weights)
    least = limits.min_few_rows_weights if x.dtype is torch.float32 else limits.min_half_few_rows_weights
    if number >= least and all(_is_plain(weight, x) for weight in weights):
        if (outs := project_few_rows(weights, x)) is not None:
            return outs
        if is_plain_float32_cpu(x) and all(_use_slices(weight.numbers, x) for weight in weights):
            return [_sliced(weight.numbers, weight.bias, x) for weight in weights]
    return [F.linear(x, weight.numbers, weight.bias) for weight in weights]


def plain_linear_weight(projection: nn.Module) -> Tensor | None:
    """The weight of a plain `nn.Linear`: exactly that class, a float `nn.Parameter`, no hook and no other forward.

    None for every other module: what its dtype and device are, and what it does with its weights, it alone knows.
    """
    return plain_weight(projection, nn.Linear)


def is_plain_float32_cpu(x: Tensor) -> bool:
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
    if weight is None or weight.dtype is not torch.float32 or not weight.is_cpu:
        return None
    # A sparse tensor cannot say whether it is contiguous.
    if weight.layout is not torch.strided or not weight.is_contiguous():
        return None
    if x.ndim != 3 or x.shape[2] != weight.shape[1] or "bias" not in linear._parameters:
        return None
    bias = linear._parameters["bias"]
    plain = bias is None or (type(bias) is nn.Parameter and bias.dtype is torch.float32 and bias.is_cpu)
    return (weight, bias) if plain else None


def _is_plain(weight: LinearWeight, x: Tensor) -> bool:
    """Whether a float weight and its bias are plain, and go together with `x` [B, L, in] on the CPU."""
    for part in (weight.numbers, weight.bias):
        if part is None:
            continue
        # A sparse tensor cannot say whether it is contiguous.
        if type(part) is not Tensor or not part.is_cpu or part.layout is not torch.strided:
            return False
        if part.dtype is not x.dtype or not part.is_contiguous():
            return False
    return x.shape[-1] == weight.numbers.shape[1]


def _use_slices(weight: Tensor, x: Tensor) -> bool:
    """Whether weights [out, in] are best cut into slices, for the tokens of `x` [B, L, in].

    While traced only in a compiled step, whose number of rows is known without a guard.
    """
    if weight.shape[0] % tuning.active.linear_slices:
        return False
    tokens = x.shape[0] * x.shape[1]
    if not is_traced(x):
        return tokens == 1 or 0 < tokens * x.shape[2] <= tuning.active.max_sliced_numbers
    if not is_compiling() or torch.compiler.is_exporting():
        return False
    # Imported here: it brings sympy along, which only compilers need.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    small = tokens * x.shape[2] <= tuning.active.max_sliced_numbers
    small = statically_known_true(tokens == 1) or statically_known_true(small)
    return small and statically_known_true(tokens > 0)


def _sliced(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    number = tuning.active.linear_slices
    parts = weight.view(number, -1, width)
    # The strides of the rows decide: as a transposed view it is quick, as a reshaped one slower than the linear.
    operand = x.contiguous().as_strided((number, width, batch * length), (0, 1, width))
    out = torch.bmm(parts, operand) if bias is None else torch.baddbmm(bias.view(number, -1, 1), parts, operand)
    if batch * length == 1:
        return out.view(1, 1, -1)
    return out.view(-1, batch * length).t().reshape(batch, length, -1)
