"""Modules that are their weights and nothing more: the one rule that says when a module may be looked through.

A weight may be packed, quantised, sharded, offloaded or made by a hook. Only where this rule says yes are a weight's
dtype and device those of the module, and only there may something else than the module's own forward read it.
"""

from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def plain_weight(module: nn.Module, kind: type[ModuleT]) -> Tensor | None:
    """The weight of a module of exactly this class, with a plain float parameter and without hooks; else None."""
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return None
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return None
    # Read where it is registered: a fifth of the cost of asking the module. A parametrized weight is not there.
    weight = module._parameters.get("weight")
    return weight if type(weight) is nn.Parameter and weight.dtype.is_floating_point else None
