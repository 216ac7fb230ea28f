"""Exceptions in any operation of PyTorch while a cache is rearranged: every layer is as it was, and goes on so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.blocks.stacks import MIXED, READERS, WITH_SINKS, Layer, cache_snapshots, make
from tests.faults.inject import ERRORS, Injected
from tests.setups import padding, tokens
from transformer import KVCache
from transformer.cache.policies import AccumulatedAttention, KeyNorm
from transformer.kernels import tuned

FULL = (Layer(groups=2), Layer(groups=1))
STACKS = {
    "mixed": (MIXED, {}),
    "with sinks, int4": (WITH_SINKS, {"stored": ("int4", "int4")}),
    "readers": (READERS, {}),
    "shared rows": (FULL, {}),
    "shared rows, int8": (FULL, {"stored": ("int8", "int8")}),
    "compressed": (WITH_SINKS, {}),
    "budget of weights": (FULL, {}),
    "frozen": (FULL, {}),
}
OPERATIONS: dict[str, Callable[[KVCache], object]] = {
    "select": lambda cache: cache.select([1, 0, 0]),
    "select one row": lambda cache: cache.select([1]),
    "join": lambda cache: KVCache.join([cache, cache.fork()]),
    "split": lambda cache: cache.split(),
    "fork": lambda cache: cache.fork(),
    "to": lambda cache: cache.to(dtype=torch.float32),
    "truncate": lambda cache: cache.truncate(cache.length - 1),
    "reserve": lambda cache: cache.reserve(200),
    "compress": lambda cache: cache.compress(4, KeyNorm()),
    "detach": lambda cache: cache.detach(),
    "freeze_layout": lambda cache: cache.freeze_layout(),
    "clear": lambda cache: cache.clear(),
}
OFTEN_WITHOUT = {"fork", "clear", "truncate"}
"""These rearrange numbers alone, most often: no operation is there that could fail."""
LIMITED = {"shared rows", "frozen"}
"""Their caches have a maximum length, as a frozen layout needs."""
REFUSED = {("budget of weights", "truncate"), ("budget of weights", "compress")}


class Rearranged:
    """A stack in which a conversation is, that is to be rearranged."""

    def __init__(self, name: str) -> None:
        layers, more = STACKS[name]
        self.stack, self.reads = make(layers, **more), any(layer.reads for layer in layers)
        for block in self.stack.blocks:
            block.attention.max_cache_length = 300 if name in LIMITED else None
            block.attention.cache_budget = (6, AccumulatedAttention(1)) if "budget" in name else None
        self.cache = KVCache.from_model(self.stack)
        self.call(tokens(2, 9, 16, seed=1), padding([(0, 9), (3, 5)], 9))
        self.call(tokens(2, 2, 16, seed=2))
        if name.startswith("shared rows"):
            self.cache.select([0, 1, 1])
        if name == "compressed":
            self.cache.compress(5, KeyNorm())
        self.call(tokens(self.cache.batch, 1, 16, seed=3))
        if name == "frozen":
            self.cache.freeze_layout()

    def call(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        read = {"source": tokens(len(x), 3, 16, seed=9)} if self.reads else {}
        return self.stack(x, attention_mask=mask, **read)

    def found(self) -> object:
        """All that can be read of each layer."""
        layers = [(part.length, part.cached_length, part.nbytes, part.nbytes_used) for part in self.cache.parts()]
        return layers, cache_snapshots(self.stack)

    def followed(self) -> object:
        """The next call, and all that can be read after it."""
        return self.call(tokens(self.cache.batch or 2, 1, 16, seed=7)).tolist(), self.found()


@pytest.fixture(autouse=True)
def _rows_share() -> Iterator[None]:
    with tuned(min_shared_bytes=0), torch.no_grad():
        yield


CASES = [
    (name, operation)
    for name in STACKS
    for operation in OPERATIONS
    if (operation != "freeze_layout" or name in LIMITED) and (name, operation) not in REFUSED
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "operation"), CASES)
def test_an_exception_at_any_operation_changes_no_layer(name: str, operation: str) -> None:
    """The next call afterwards is that of a conversation without failures, and so is the operation, once it succeeds.
    `pytest -rP` shows the counts."""
    change, clean = OPERATIONS[operation], Rearranged(name)
    before, next_call = clean.found(), clean.followed()
    clean = Rearranged(name)
    with Injected() as counting:
        change(clean.cache)
    after = clean.found()
    assert counting.count >= 4 or operation in OFTEN_WITHOUT
    continued, repeated = Rearranged(name), Rearranged(name)
    for at in range(counting.count):
        for case in (continued, repeated):
            with pytest.raises(tuple(ERRORS), match="injected"), Injected(at):
                change(case.cache)
            assert case.found() == before, at
    assert continued.followed() == next_call
    change(repeated.cache)
    assert repeated.found() == after
    sys.stdout.write(f"{name}, {operation}: exceptions at {counting.count} operations, 0 changes\n")
