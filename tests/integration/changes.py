"""Changes of what projects a source: each changes the result, and some are hard to detect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.integration.models import LowRank
from tests.oracle import Options
from tests.setups import build, fill
from transformer import MultiHeadAttention


def attention(**more: Any) -> MultiHeadAttention:
    return build(Options(causal=False, num_groups=4, **more), "MHA").eval()


def wide(**_: Any) -> MultiHeadAttention:
    """With more numbers than a check of single numbers could compare."""
    module = MultiHeadAttention(256, 4, use_kv_cache=True, dtype=torch.float64).eval()
    fill(module, 0)
    return module


def with_adapters() -> MultiHeadAttention:
    module = attention()
    module.k_proj, module.v_proj = LowRank(module.k_proj), LowRank(module.v_proj)
    return module


def with_hook() -> MultiHeadAttention:
    module = attention()
    module.handle = module.v_proj.register_forward_hook(lambda _, given, out: out * 3)
    return module


def with_hook_that_scales() -> MultiHeadAttention:
    """As an adapter that is switched on and off does."""
    module = attention()
    module.hooked = [3]
    module.v_proj.register_forward_hook(lambda _, given, out: out * sum(module.hooked, 1))
    return module


def with_parametrization() -> MultiHeadAttention:
    module = attention()
    parametrize.register_parametrization(module.v_proj, "weight", Doubled())
    return module


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def memory(module: nn.Module) -> list[Tensor]:
    """The weights that a source is projected by."""
    return [module.k_proj.weight, module.v_proj.weight]


def assign(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    for weight in memory(module):
        weight.data = change(weight.data)


def come_back(module: nn.Module) -> None:
    """Other numbers at the address where the old ones were."""
    for weight in memory(module):
        old = weight.data
        weight.data = old * 1.5
        old.copy_(weight.data)
        weight.data = old


def move_until_the_address_comes_back(module: nn.Module) -> None:
    """As an allocator does it by itself, at the latest after so many times."""
    weight = module.v_proj.weight
    address = weight.data_ptr()
    for _ in range(20):
        weight.data = weight.data * 1.1
        if weight.data_ptr() == address:
            return


def optimise(make: Callable[..., torch.optim.Optimizer]) -> Callable[[nn.Module], None]:
    def step(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        make(module.parameters()).step()
        module.zero_grad()

    return step


def average(module: nn.Module) -> None:
    """As EMA and target networks write their weights."""
    for weight in memory(module):
        weight.data.lerp_(torch.ones_like(weight), 0.3)


def switch_off(module: nn.Module) -> None:
    module.k_proj.active = module.v_proj.active = False


def merge(module: nn.Module) -> None:
    """As peft merges an adapter."""
    for linear in (module.k_proj, module.v_proj):
        linear.base_layer.weight.data += 2 * linear.up.weight.data @ linear.down.weight.data
        linear.active = False


def set_submodules(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    module.k_proj, module.v_proj = make(module.k_proj), make(module.v_proj)


def another(linear: nn.Linear) -> nn.Linear:
    made = nn.Linear(16, 16, dtype=torch.float64)
    fill(made, 3)
    return made


ADAM = torch.optim.AdamW
PLAIN: dict[str, Callable[[nn.Module], Any]] = {
    "copy_": lambda m: m.v_proj.weight.copy_(m.v_proj.weight * 2),
    "mul_ of a detached alias": lambda m: m.v_proj.weight.detach().mul_(2),
    "data.mul_": lambda m: m.v_proj.weight.data.mul_(2),
    "data.mul_ of the keys": lambda m: [m.k_proj.weight.data.mul_(2), m.k_proj.bias.data.mul_(2)],
    "data of the bias": lambda m: m.v_proj.bias.data.add_(1),
    "data =": lambda m: assign(m, lambda weight: weight * 2),
    "data = of another layout": lambda m: assign(m, lambda weight: (weight * 2).t().contiguous().t()),
    "an address that comes back": come_back,
    "an address that the allocator gives again": move_until_the_address_comes_back,
    "EMA": average,
    "initialisation anew": lambda m: nn.init.normal_(m.v_proj.weight),
    "initialisation of data anew": lambda m: m.v_proj.weight.data.normal_(),
    "NumPy over the weight": lambda m: m.v_proj.weight.detach().numpy().__imul__(2),
    "load_state_dict": lambda m: m.load_state_dict({name: v * 2 for name, v in m.state_dict().items()}),
    "load_state_dict(assign)": lambda m: m.load_state_dict(
        {name: v * 2 for name, v in m.state_dict().items()}, assign=True
    ),
    "a new parameter": lambda m: setattr(m.v_proj, "weight", nn.Parameter(m.v_proj.weight * 2)),
    "SGD": optimise(lambda p: torch.optim.SGD(p, lr=0.1)),
    "fused SGD": optimise(lambda p: torch.optim.SGD(p, lr=0.1, fused=True)),
    "AdamW": optimise(lambda p: ADAM(p, lr=0.1, foreach=False)),
    "foreach AdamW": optimise(lambda p: ADAM(p, lr=0.1, foreach=True)),
    "fused AdamW": optimise(lambda p: ADAM(p, lr=0.1, fused=True)),
    "weights of another dtype and back": lambda m: m.float().double(),
}
"""Changes of the weights of plain linears."""

OTHER: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "another module": (attention, lambda m: set_submodules(m, another)),
    "adapters put in": (attention, lambda m: set_submodules(m, LowRank)),
    "adapters taken out": (with_adapters, lambda m: set_submodules(m, lambda lora: lora.base_layer)),
    "adapters switched off": (with_adapters, switch_off),
    "adapters merged": (with_adapters, merge),
    "weights of an adapter": (with_adapters, lambda m: m.v_proj.up.weight.data.mul_(2)),
    "a hook": (attention, lambda m: m.v_proj.register_forward_hook(lambda _, given, out: out * 2)),
    "a hook before": (attention, lambda m: m.k_proj.register_forward_pre_hook(lambda _, given: (2 * given[0],))),
    "a hook removed": (with_hook, lambda m: m.handle.remove()),
    "the factor of a hook": (with_hook_that_scales, lambda m: m.hooked.clear()),
    "a parametrization": (
        attention,
        lambda m: parametrize.register_parametrization(m.v_proj, "weight", Doubled()),
    ),
    "a parametrization removed": (
        with_parametrization,
        lambda m: parametrize.remove_parametrizations(m.v_proj, "weight", leave_parametrized=False),
    ),
    "a forward of the linear's own": (
        attention,
        lambda m: setattr(m.v_proj, "forward", lambda x, linear=m.v_proj: 2 * nn.Linear.forward(linear, x)),
    ),
    "the norm of the keys": (lambda: attention(qk_norm=True), lambda m: m.k_norm.weight.data.mul_(-2)),
}
"""Changes of what stands in place of a projection, or around it."""

CHANGES = {
    **{f"{name}, 16": (attention, change) for name, change in PLAIN.items()},
    **{f"{name}, 256": (wide, change) for name, change in PLAIN.items()},
    **OTHER,
}
