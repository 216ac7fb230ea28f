"""Training step of one layer: time and peak memory of forward and backward."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, product

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .case import Candidate, Case, Setup
from .chunks import flops
from .grid import Grid
from .layers import layer
from .limits import arithmetic
from .peers import TORCH, WHOLE, X_TRANSFORMERS, LlamaWhole, TorchWhole, XTransformersWhole

KIND = "Training step"


def cases(grid: Grid) -> Iterator[Case]:
    """All batch sizes."""
    for (batch, length), groups in product(grid.training, grid.prefill_groups):
        point = {"batch": batch, "tokens": length, "G": groups}
        yield Case(KIND, point, partial(setup, grid, batch, length, groups), training=True)


def setup(grid: Grid, batch: int, length: int, groups: int) -> Setup:
    """Gradients of the weights, and of the input as for a layer before this one."""
    place = grid.place()
    x = place.random(batch, length, grid.embed_dim).requires_grad_()
    slope = place.random(batch, length, grid.embed_dim)
    peers = {WHOLE: LlamaWhole(grid, groups), X_TRANSFORMERS: XTransformersWhole(grid, groups)}
    if groups == grid.num_heads:
        peers[TORCH] = TorchWhole(grid, length)
    pairs = batch * length * (length + 1) / 2
    return Setup(
        candidate(layer(grid, place, groups), x, slope),
        {name: candidate(place.module(module), x, slope) for name, module in peers.items()},
        limits=[arithmetic(3 * flops(grid, groups, batch * length, pairs), place)],
    )


def candidate(module: nn.Module, x: Tensor, slope: Tensor) -> Candidate:
    """Forward and backward; `held` is the peak allocation of a step with its gradients."""
    module.train()

    def run() -> None:
        x.grad = None
        module.zero_grad()
        module(x).backward(slope)

    run()
    return Candidate(run, held=peak_bytes(run, x.device.type))


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The peak bytes of tensors that a call allocates."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    # The raw events: those of `profiled.events()` have been counted to the operators already.
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(held, default=0)
