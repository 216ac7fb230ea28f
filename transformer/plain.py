"""Tests for plain modules: those whose weight may be read without a call, and those that work token by token.

A weight can be packed, quantised, sharded, offloaded or computed by a hook. Only the weight of a plain module has the
dtype and device of the module, and only that weight may be read outside of the module's forward.
"""

from abc import ABC, abstractmethod
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

ModuleT = TypeVar("ModuleT", bound=nn.Module)

LINEAR_FORWARD, LINEAR_CALL = nn.Linear.forward, nn.Linear.__call__
"""PyTorch's own, by which a replaced one is known."""

TOKEN_WISE = frozenset(
    {nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.Identity, nn.Dropout, nn.GELU, nn.SiLU, nn.ReLU}
)
"""Modules of PyTorch whose result for a token depends on this token alone."""


class HasPlainWeights(ABC):
    """A module whose parameters are no plain tensors, but that computes with plain ones."""

    @abstractmethod
    def plain_weights(self) -> tuple[Tensor, ...]:
        """The tensors that decide its result, the same objects as long as the parameters stay."""


def is_hooked(module: nn.Module) -> bool:
    """True if a call of the module runs more than the forward of its class: hooks, or a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def has_global_hooks() -> bool:
    """True if hooks are registered for all modules, or the call of a linear layer is replaced in its class."""
    return bool(
        global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or nn.Linear.forward is not LINEAR_FORWARD
        or nn.Linear.__call__ is not LINEAR_CALL
    )


def plain_weight(module: nn.Module, kind: type[ModuleT]) -> Tensor | None:
    """The weight of a module of exactly the class `kind`, if it is a plain float parameter without hooks; else None."""
    if type(module) is not kind or is_hooked(module) or has_global_hooks():
        return None
    # Read from the registry, which costs a fifth of `module.weight`. A parametrized weight is not registered there.
    weight = module._parameters.get("weight")
    return weight if type(weight) is nn.Parameter and weight.dtype.is_floating_point else None


def is_token_wise(module: nn.Module) -> bool:
    """True if a module may be given a flat run of tokens [1, N, E] in the place of rows [B, L, E].

    That is known of modules of `TOKEN_WISE` and of classes of this library that say so (`token_wise = True` in the
    class itself, which a subclass has to say again), with nothing but such modules inside. No module may have a hook, a
    parametrization, a compiled call or a forward of its own: these are shown rows.
    """
    if has_global_hooks() or global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks:
        return False
    return _is_token_wise(module)


def _is_token_wise(module: nn.Module) -> bool:
    kind, parts = type(module), module.__dict__
    if kind not in TOKEN_WISE and not kind.__dict__.get("token_wise", False):
        return False
    if parts["_forward_hooks"] or parts["_forward_pre_hooks"] or "forward" in parts:
        return False
    if parts["_backward_hooks"] or parts["_backward_pre_hooks"] or parts.get("_compiled_call_impl") is not None:
        return False
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) != 1:
        return False
    return all(child is None or _is_token_wise(child) for child in parts["_modules"].values())
