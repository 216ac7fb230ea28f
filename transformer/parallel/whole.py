"""Parallel model as it was before: its parameters in the modules of one process, for questions of options."""

from torch import nn

from .changes import CUTS, REPLICATED
from .heads import SharedAttention, SharedModule

WHOLE_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    **{shared: kind for kind, shared in REPLICATED.items()},
    **{cut.kind: cut.whole for cut in CUTS.values()},
}
"""The class that a module had before, by its class over ranks."""


def whole_model(model: nn.Module) -> nn.Module:
    """A model with the classes and numbers of heads from before `parallelize`, and the same DTensors as parameters.

    It shares all else with `model`, which stays as it is, and cannot compute.
    """
    return _whole(model, {})


def _whole(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in known:
        kind = module.whole_class if isinstance(module, SharedModule) else WHOLE_CLASSES.get(type(module), type(module))
        whole: nn.Module = object.__new__(kind)
        known[id(module)] = whole
        children = {name: None if each is None else _whole(each, known) for name, each in module._modules.items()}
        whole.__dict__.update(module.__dict__ | {"_modules": children})
        if isinstance(module, SharedAttention):
            number = module.ranks.number
            whole.__dict__.update(num_heads=module.num_heads * number, num_groups=module.num_groups * number)
    return known[id(module)]
