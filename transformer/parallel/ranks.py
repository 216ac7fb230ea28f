"""Ranks that share a model or its sequence, and what they exchange, as operations that autograd follows.

Megatron's two operators (arXiv 1909.08053): what enters the rank's share of a layer is copied, and its gradients are
summed; what leaves it is summed, and its gradient is copied. Calls that are compiled use functional collectives.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from ..errors import RanksError
from ..tracing import is_traced

T = TypeVar("T")


class Ranks:
    """The ranks of a one-dimensional mesh, as this one of them sees them.

    `number` is how many there are, `rank` this one's place among them. A copy of a model is shared by the same ranks.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.group = mesh.get_group()
        # By name, as compiled calls find it.
        self.name: str = self.group.group_name
        self.number = mesh.size()
        self.rank = mesh.get_local_rank()

    def share(self, size: int) -> range:
        """The part of `size` rows, heads or tokens that this rank has, as `torch.chunk` cuts: the last are short."""
        width = -(-size // self.number)
        return range(min(self.rank * width, size), min((self.rank + 1) * width, size))

    def copied(self, x: Tensor) -> Tensor:
        """`x`, equal on all ranks; its gradients are summed over the ranks."""
        return _Copied.apply(x, self.name) if torch.is_grad_enabled() else x  # type: ignore[no-untyped-call]

    def summed(self, x: Tensor) -> Tensor:
        """`x` of each rank, summed over the ranks. Without gradients in place: `x` is given away."""
        if torch.is_grad_enabled() or is_traced(x):
            return _Summed.apply(x, self.name)  # type: ignore[no-any-return,no-untyped-call]
        x = x.contiguous()
        with Exchange():
            self.group.allreduce([x]).wait()
        return x

    def joined(self, x: Tensor, size: int, dim: int = -1) -> Tensor:
        """The parts of all ranks along a dimension, which has `size` together; the gradient of each is its part."""
        return _Joined.apply(x, self.name, self.number, self.rank, size, dim)  # type: ignore[no-any-return,no-untyped-call]

    def gathered(self, x: Tensor) -> Tensor:
        """[ranks, ...]: `x` [...] of each rank, all of one shape.

        Gradients of all ranks are summed, and each rank gets those of its own `x`.
        """
        return _Gathered.apply(x, self.name, self.number)  # type: ignore[no-any-return,no-untyped-call]

    def told(self, value: Any) -> list[Any]:
        """What each rank says, in their order."""
        values: list[Any] = [None] * self.number
        with Exchange():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def agreed(self, work: Callable[[], T]) -> T:
        """The result of `work`, which each rank runs. If it raises on one rank, the others raise RanksError."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        said = self.told(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise RanksError(f"rank {rank} of {self.number} failed, so that no rank goes on: {text}")
        return result  # type: ignore[return-value]  # an error was raised

    def check_equal(self, given: Mapping[str, str]) -> None:
        """Raises RanksError, on every rank, where one was given something else, naming it."""
        said = self.told(dict(given))
        rank = first_difference(said)
        if rank is not None:
            differing = [name for name in given if said[rank].get(name) != said[0].get(name)]
            raise RanksError(
                f"{', '.join(differing)}: expected the same on every rank, got others on rank {rank} than on rank 0"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Ranks, (self.mesh,)

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.number}"


class Exchange:
    """A context in which a failed exchange raises RanksError. It is entered in every step: cheaper than a generator."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise RanksError(
                "ranks: expected every rank that shares the model or its sequence to take part in the same call, but "
                "one ended, waited too long, or made another call; look at the first error among the ranks, and start "
                f"all of them again: {error}"
            ) from error


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum(gradients[0], ctx.name), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, name: str) -> Tensor:
        return _sum(x, name)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, number: int, rank: int, size: int, dim: int) -> Tensor:
        width = -(-size // number)
        ctx.dim, ctx.first, ctx.width = dim, min(rank * width, size), x.shape[dim]
        x = x.movedim(dim, -1)
        # The last parts may be short.
        x = F.pad(x, (0, width - x.shape[-1])).contiguous()
        parts = _gathered(x, name, number).view(number, *x.shape).unbind()
        widths = [max(min(width, size - first), 0) for first in range(0, number * width, width)]
        own = [part[..., :width] for part, width in zip(parts, widths, strict=True)]
        return torch.cat([part.movedim(-1, dim) for part in own], dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return gradients[0].narrow(ctx.dim, ctx.first, ctx.width), None, None, None, None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, number: int) -> Tensor:
        ctx.name, ctx.number = name, number
        return _gathered(x.unsqueeze(0).contiguous(), name, number)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        scattered = torch.ops._c10d_functional.reduce_scatter_tensor
        return _exchanged(scattered, gradients[0].contiguous(), "sum", ctx.number, ctx.name).squeeze(0), None, None


def _sum(x: Tensor, name: str) -> Tensor:
    return _exchanged(torch.ops._c10d_functional.all_reduce, x, "sum", name)


def _gathered(x: Tensor, name: str, number: int) -> Tensor:
    return _exchanged(torch.ops._c10d_functional.all_gather_into_tensor, x, number, name)


def _exchanged(collective: Callable[..., Tensor], *arguments: Any) -> Tensor:
    if torch.compiler.is_dynamo_compiling():
        return torch.ops._c10d_functional.wait_tensor(collective(*arguments))  # type: ignore[no-any-return]
    with Exchange():
        return torch.ops._c10d_functional.wait_tensor(collective(*arguments))  # type: ignore[no-any-return]


def first_difference(values: Sequence[Any]) -> int | None:
    """The first rank that says something else than rank 0; None where all say the same."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)
