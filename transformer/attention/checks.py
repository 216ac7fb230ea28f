"""Checks of the arguments of a call of an attention module."""

import math

import torch
from torch import Tensor, nn

from ..cache import CacheSpec, KnownMask, LayerCache, Step, active_call
from ..errors import (
    ArgumentError,
    CacheStateError,
    DeviceError,
    DtypeError,
    ShapeError,
)
from ..kernels import plain_linear_weight
from ..masks import Rule
from ..plain import HasPlainWeights
from ..tracing import is_traced


def check_tensor(name: str, x: Tensor, width: int, weight: Tensor | None) -> None:
    """Raises ArgumentError, ShapeError, DtypeError or DeviceError unless `x` is [B, L, width] like its `weight`."""
    if not isinstance(x, Tensor):
        raise ArgumentError(f"{name}: expected a tensor [B, L, {width}], got {type(x).__name__}")
    if x.ndim != 3 or x.shape[2] != width:
        raise ShapeError(f"{name}: expected [B, L, {width}], got {list(x.shape)}")
    if weight is None:
        return
    if x.dtype is not weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise DtypeError(
            f"{name}: expected {weight.dtype}, as the module's weights, got {x.dtype}; convert one of them with .to()"
        )
    if x.device != weight.device:
        raise DeviceError(
            f"{name}: expected a tensor on {weight.device}, as the module's weights, got {x.device}; move one of them"
        )


def check_mode(expanding_context: object) -> None:
    """Raises ArgumentError unless it is None, True or False: a tensor there was meant to be something else."""
    if expanding_context is not None and expanding_context is not True and expanding_context is not False:
        raise ArgumentError(
            f"expanding_context: expected None, True or False, got {type(expanding_context).__name__}; cross-attention "
            "is attention(x, kv=source), which projects keys and values from one source itself"
        )


def real_tokens(name: str, mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor | None:
    """A padding mask [B, L] as bool, or None. Raises ArgumentError, ShapeError, DtypeError or DeviceError otherwise.

    Integers other than 0 and 1 are refused where that costs no look at a device: in eager calls, on the CPU.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ArgumentError(f"{name}: expected a tensor [B, L], true for real tokens, got {type(mask).__name__}")
    if mask.shape != (batch, length):
        raise ShapeError(f"{name}: expected [{batch}, {length}], true for real tokens, got {list(mask.shape)}")
    if mask.device != device:
        raise DeviceError(f"{name}: expected a tensor on {device}, as x, got {mask.device}")
    if mask.is_floating_point() or mask.is_complex():
        raise DtypeError(
            f"{name}: expected bool, or integers 1 for real tokens and 0 for padding, got {mask.dtype}; numbers that "
            "are added to scores go into attn_bias"
        )
    if mask.dtype == torch.bool:
        return mask
    if mask.is_cpu and not is_traced(mask):
        check_zeros_and_ones(name, mask)
    return mask != 0


def check_zeros_and_ones(name: str, mask: Tensor) -> None:
    """Raises ArgumentError where a mask of integers has others than 0 and 1. It asks the mask's device."""
    if not mask.numel():
        return
    least, most = mask.aminmax()
    if int(least) < 0 or int(most) > 1:
        raise ArgumentError(
            f"{name}: expected bool, or integers 1 for real tokens and 0 for padding, got numbers from {int(least)} to "
            f"{int(most)}; numbers that are added to scores go into attn_bias"
        )


def real_in_every_row(
    name: str, mask: Tensor | None, batch: int, length: int, device: torch.device
) -> KnownMask | None:
    """As `real_tokens`, of what a generation begins with, and the same on the CPU: the host looks at it once.

    Raises ArgumentError where a row has no real token.
    """
    real = real_tokens(name, mask, batch, length, device)
    if mask is None or real is None:
        return None
    on_host = _on_host(name, mask)
    if not bool(on_host.any(-1).all()):
        raise ArgumentError(f"{name}: expected at least one real token in every row, got a row without one")
    return KnownMask(real, on_host)


def counted_tokens(x: Tensor, attention_mask: Tensor | None) -> Step:
    """The tokens of an eager call with `x` [B, L, E]. Raises as `real_tokens` does where the mask does not fit."""
    name = "attention_mask"
    real = real_tokens(name, attention_mask, x.shape[0], x.shape[1], x.device)
    if attention_mask is None or attention_mask.is_cpu or is_traced(x):
        return Step.of(x, real)
    call = active_call()
    known = None if call is None else call.inputs.on_host(attention_mask)
    return Step.of(x, real, _on_host(name, attention_mask) if known is None else known)


def _on_host(name: str, mask: Tensor) -> Tensor:
    """A mask as bool on the CPU: the one look of the host at it, as given, so that its numbers are checked as well."""
    on_host = mask.cpu()
    if on_host.dtype == torch.bool:
        return on_host
    check_zeros_and_ones(name, on_host)
    return on_host != 0


def traced_tokens(x: Tensor, attention_mask: Tensor | None) -> Step:
    """The same of a traced call without a cache, which reads no mask on the host."""
    return Step.traced_of(x, real_tokens("attention_mask", attention_mask, x.shape[0], x.shape[1], x.device))


def check_attn_bias(attn_bias: Tensor, shape: tuple[int, int, int, int], device: torch.device) -> None:
    """Raises ArgumentError, ShapeError, DtypeError or DeviceError unless it broadcasts to `shape` [B, H, L, S].

    +inf and NaN are refused where that costs no look at a device: in eager calls, on the CPU.
    """
    if not isinstance(attn_bias, Tensor):
        raise ArgumentError(
            f"attn_bias: expected a tensor that broadcasts to [B, H, L, S] = {list(shape)}, "
            f"got {type(attn_bias).__name__}"
        )
    sizes = tuple(attn_bias.shape)
    fits = len(sizes) <= 4 and all(a in (1, b) for a, b in zip(reversed(sizes), reversed(shape), strict=False))
    if not fits:
        raise ShapeError(
            f"attn_bias: expected to broadcast to [B, H, L, S] = {list(shape)} (S: the cached tokens before the call, "
            f"then those of the call), got {list(sizes)}"
        )
    if attn_bias.dtype != torch.bool and not attn_bias.is_floating_point():
        raise DtypeError(f"attn_bias: expected a float or bool tensor, got {attn_bias.dtype}")
    if attn_bias.device != device:
        raise DeviceError(f"attn_bias: expected a tensor on {device}, as x, got {attn_bias.device}")
    if attn_bias.dtype == torch.bool or not attn_bias.is_cpu or is_traced(attn_bias) or not attn_bias.numel():
        return
    largest = attn_bias.detach().amax().item()
    if not largest < math.inf:
        raise ArgumentError(
            f"attn_bias: expected finite numbers, or -inf for keys that are not visible, got {largest} among them"
        )


def check_no_source(kv_mask: Tensor | None, kv_dim: int, embed_dim: int) -> None:
    """Raises ArgumentError where a call without `kv` cannot be self-attention."""
    if kv_mask is not None:
        raise ArgumentError("kv_mask: expected None without kv; give attention_mask to hide tokens of x")
    if kv_dim != embed_dim:
        raise ArgumentError(f"kv: expected [B, S, {kv_dim}], since the module was built with that kv_dim, got None")


def check_source(kv: Tensor, batch: int, kv_dim: int, weight: Tensor | None, causal: bool) -> None:
    """Raises ArgumentError, ShapeError, DtypeError or DeviceError where `kv` is no source of so many rows."""
    if causal:
        raise ArgumentError("kv: expected None with apply_causal_mask=True; an external source has no order in time")
    check_tensor("kv", kv, kv_dim, weight)
    if kv.shape[0] != batch:
        raise ShapeError(f"kv: expected {batch} rows, as x, got {kv.shape[0]}")


def check_step_alone(step: object, expanding_context: bool | None, attention_mask: Tensor | None) -> None:
    """Raises ArgumentError unless `step` is one, and comes without what it carries itself."""
    if not isinstance(step, Step):
        raise ArgumentError(f"step: expected None or what plan() gives, got {type(step).__name__}")
    if expanding_context is not None or attention_mask is not None:
        raise ArgumentError("step: expected no expanding_context and no attention_mask beside it; it carries both")


def check_step(step: Step, x: Tensor, rule: Rule, cached: bool, traced: bool) -> None:
    """Raises ArgumentError, ShapeError or CacheStateError where a step was made for another call or kind of layer."""
    if step.at is not None and not traced:
        raise ArgumentError(
            "step: expected one planned outside of torch.compile, torch.export, torch.func and fake tensors, as this "
            "call is, got one planned inside; plan() anew"
        )
    if step.rule != rule:
        raise ArgumentError(f"step: made for {step.rule}, but this module has {rule}; plan one step per kind of layer")
    if step.flat or (step.batch, step.tokens) != tuple(x.shape[:2]) or step.device != x.device:
        check_shape_of_step(step, x)
    if not cached and max(step.past_lengths):
        raise CacheStateError("step: made for a cache with tokens, but this module has use_kv_cache=False")


def check_shape_of_step(step: Step, x: Tensor) -> None:
    """Raises ShapeError where a step was made for other tokens than those of `x`."""
    if step.shape != tuple(x.shape[:2]) or step.device != x.device:
        raise ShapeError(
            f"step: made for {list(step.shape)} tokens on {step.device}, got x {list(x.shape)} on {x.device}"
        )


def check_cache(cache: object, spec: CacheSpec) -> None:
    """Raises ArgumentError or ShapeError where a cache is not one that a module of this specification can continue."""
    if not isinstance(cache, LayerCache):
        raise ArgumentError(f"kv_cache: expected None or the kv_cache of a module, got {type(cache).__name__}")
    expected, got = ((each.num_kv_heads, each.head_dim, each.num_sinks) for each in (spec, cache.spec))
    if got != expected:
        raise ShapeError(f"kv_cache: expected num_kv_heads, head_dim, num_sinks = {expected}, got {got}")
    if cache.spec.share != spec.share:
        raise ArgumentError(
            f"kv_cache: expected the heads of share (rank, ranks) = {spec.share}, got those of {cache.spec.share}; "
            "where ranks share a model, each loads what it saved itself, and there are as many of them"
        )


def weight_of(projection: nn.Module) -> Tensor | None:
    """The weight that `x` must be like; None where a projection itself knows what it takes: packed, wrapped, hooked."""
    if isinstance(projection, HasPlainWeights):
        return projection.plain_weights()[0]
    return plain_linear_weight(projection)
