"""Whole models: an exception in any operation or part of a step leaves all layers as they were."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.blocks.stacks import READERS, WITH_SINKS, Layer, cache_snapshots, make
from tests.faults.inject import ERRORS, HookError, Injected, failing
from tests.setups import padding, tokens
from transformer import KVCache
from transformer.attention import plan_steps
from transformer.blocks import BlockStack

EXPANDING = (Layer(groups=2), Layer(groups=1))
X, SOURCE, RAGGED = tokens(2, 7, 16, seed=40), tokens(2, 5, 16, seed=41), padding([(0, 3), (1, 1)], 3)


@dataclass(frozen=True)
class Conversation:
    """A model, its earlier calls, and the step that fails."""

    layers: tuple[Layer, ...]
    before: tuple[int, ...] = (4, 1)
    length: int = 1
    ragged: bool = False
    mode: bool | None = None

    def model(self) -> BlockStack:
        """With its tables of angles made already: those of a first call are in test_failing_operations.py."""
        stack = make(self.layers)
        self.call(stack, X)
        return stack

    def begin(self, stack: BlockStack) -> None:
        KVCache.from_model(stack).remove(stack)
        for seed, length in enumerate(self.before):
            self.call(stack, tokens(2, length, 16, seed=seed))

    def step(self, stack: BlockStack) -> Tensor:
        return self.call(stack, X[:, : self.length], self.mask)

    @property
    def mask(self) -> Tensor | None:
        return RAGGED if self.ragged else None

    @property
    def source(self) -> dict[str, Tensor]:
        return {"source": SOURCE} if any(layer.reads for layer in self.layers) else {}

    @torch.no_grad()
    def call(self, stack: BlockStack, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return stack(x, expanding_context=self.mode, attention_mask=mask, **self.source)


CONVERSATIONS = {
    "prefill": Conversation(EXPANDING, before=(), length=3),
    "decode": Conversation(EXPANDING),
    "prefill, sinks": Conversation(WITH_SINKS[:2], before=(), length=4),
    "decode, sinks": Conversation(WITH_SINKS[:2], before=(4, 3)),
    "back to the front, sinks": Conversation(WITH_SINKS[:1], before=(3,) * 23, length=2),
    "ragged, sinks": Conversation(WITH_SINKS[:2], length=3, ragged=True),
    "prefill, cross-attention": Conversation(READERS[:2], before=(), length=3),
    "decode, cross-attention": Conversation(READERS[:2]),
    "ragged, cross-attention": Conversation(READERS[:2], length=3, ragged=True),
    "slides from now on": Conversation(EXPANDING, mode=False),
}


class Counts:
    """What happened in a test, to be shown and held to a least number."""

    injected = changed = retried = 0

    def check(self, name: str, least: int) -> None:
        sys.stdout.write(
            f"{name}: {self.injected} exceptions, {self.changed} states changed, {self.retried} retries equal\n"
        )
        assert self.injected >= least
        assert self.changed == 0
        assert self.retried > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_exception_at_any_operation_changes_no_layer(name: str) -> None:
    """At each operation of the step, with out of memory, Ctrl-C and partial writes: each layer is bit for bit as
    before. After up to eight failures in a row, the same step and its caches are bit for bit those of a model without
    failures. (One layer is retried after each failure in test_failing_operations.py.) `pytest -rP` shows the counts."""
    conversation, counts = CONVERSATIONS[name], Counts()
    clean, stack = conversation.model(), conversation.model()
    conversation.begin(clean)
    with Injected() as counting:
        expected = conversation.step(clean)
    after, kinds = cache_snapshots(clean), set()
    conversation.begin(stack)
    before = cache_snapshots(stack)
    for at in range(counting.count):
        with pytest.raises(tuple(ERRORS), match="injected") as raised, Injected(at):
            conversation.step(stack)
        kinds.add(raised.type)
        counts.injected += 1
        counts.changed += cache_snapshots(stack) != before
        if at % 8 == 7 or at == counting.count - 1:
            assert torch.equal(conversation.step(stack), expected), at
            assert cache_snapshots(stack) == after, at
            counts.retried += 1
            conversation.begin(stack)
    assert torch.OutOfMemoryError in kinds
    counts.check(name, 60 * len(conversation.layers))


@pytest.mark.slow
@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("name", ["decode, sinks", "ragged, cross-attention", "prefill, cross-attention"])
def test_a_raising_hook_on_any_part_changes_no_layer(name: str, register: str) -> None:
    """On every submodule in turn, the stack itself included, in the first layer and in the last."""
    conversation, counts, silent = CONVERSATIONS[name], Counts(), []
    clean, stack = conversation.model(), conversation.model()
    conversation.begin(clean)
    expected = conversation.step(clean)
    after = cache_snapshots(clean)
    for path, part in stack.named_modules():
        conversation.begin(stack)
        before = cache_snapshots(stack)
        with failing(part, register):
            try:
                conversation.step(stack)
            except HookError:
                counts.injected += 1
                # A hook after the whole stack comes when its step is done: that one is not taken back.
                done = part is stack and register == "register_forward_hook"
                counts.changed += cache_snapshots(stack) != (after if done else before)
            else:
                silent.append(path)
        if cache_snapshots(stack) != before:
            conversation.begin(stack)
        assert torch.equal(conversation.step(stack), expected), path
        assert cache_snapshots(stack) == after, path
        counts.retried += 1
    # What a kept source needs no more, and what is never called, cannot fail.
    reused = {path for path in silent if conversation.before and path.endswith(REUSED)}
    assert {path.rpartition(".")[2] for path in silent if path not in reused} == SILENT
    counts.check(f"{name}, {register}", 25)


SILENT, REUSED = {"blocks", "position"}, ("cross_attention.k_proj", "cross_attention.v_proj")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_transaction_adds_no_operation(name: str) -> None:
    """The same step inside one more transaction, and by hand, block by block, with the steps that `plan_steps` gives:
    tensor operations are counted, and their number is the same. Padding a stack takes out, which blocks by hand do not:
    there only their outputs at real tokens are compared."""
    conversation, counts, outs = CONVERSATIONS[name], [], []

    def within(stack: BlockStack) -> Tensor:
        with KVCache.from_model(stack).transaction():
            return conversation.step(stack)

    @torch.no_grad()
    def by_hand(stack: BlockStack) -> Tensor:
        x = X[:, : conversation.length]
        steps = plan_steps([block.attention for block in stack.blocks], x, conversation.mode, conversation.mask)
        for block, step in zip(stack.blocks, steps, strict=True):
            x = block(x, step=step, **(conversation.source if block.cross_attention is not None else {}))
        return stack.norm(x)

    for way in (conversation.step, within, by_hand):
        stack = conversation.model()
        conversation.begin(stack)
        with Injected() as counting:
            outs.append(way(stack))
        counts.append(counting.count)
    sys.stdout.write(f"{name}: {counts} operations\n")
    if conversation.ragged:
        torch.testing.assert_close(outs.pop()[RAGGED], outs[0][RAGGED], rtol=0, atol=1e-12)
        counts.pop()
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert counts == counts[:1] * len(counts)
    assert counts[0] > 40
