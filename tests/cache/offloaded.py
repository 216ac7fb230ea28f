"""Conversations for tests of `offload`: stacks that have read the same two chunks, and their next calls."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.blocks.stacks import MIXED, READERS, WITH_SINKS, make
from tests.setups import padding, tokens
from transformer import KVCache
from transformer.blocks import BlockStack

STACKS = {"mixed": MIXED, "with sinks": WITH_SINKS, "readers": READERS}
RAGGED = padding([(0, 5), (2, 3)], 5)


def source_of(name: str, batch: int = 2) -> dict[str, Tensor]:
    """The source that the stack of this name reads, if any."""
    return {"source": tokens(batch, 3, 16, seed=9)} if name == "readers" else {}


@torch.no_grad()
def fed(name: str = "mixed", mask: Tensor | None = RAGGED) -> tuple[BlockStack, KVCache]:
    """A stack with a conversation of two rows, in two calls, and its live view."""
    stack = make(STACKS[name])
    stack(tokens(2, 5, 16, seed=1), attention_mask=mask, **source_of(name))
    stack(tokens(2, 2, 16, seed=2), **source_of(name))
    return stack, KVCache.from_model(stack)


@torch.no_grad()
def step(stack: BlockStack, name: str = "mixed", seed: int = 3, length: int = 1) -> Tensor:
    """The next call, of as many rows as there are."""
    batch = KVCache.from_model(stack).batch or 2
    return stack(tokens(batch, length, 16, seed=seed), **source_of(name, batch))
