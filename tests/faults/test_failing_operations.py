"""Exceptions in any operation of a call: the cache is unchanged, and the call can be repeated."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same, cache_snapshot
from tests.faults.inject import ERRORS, Injected
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens
from transformer.cache.policies import AccumulatedAttention, KeyNorm, LastQueries, Random


@dataclass(frozen=True)
class Conversation:
    """The earlier calls, and the call that fails."""

    options: dict = field(default_factory=dict)
    before: tuple[int, ...] = (3, 1)
    length: int = 2
    spans: tuple[tuple[int, int], ...] | None = None
    mode: bool | None = None
    grad: bool = False
    source: bool = False
    more: dict = field(default_factory=dict)
    least: int = 15
    """Fewer operations than these would mean that the injection missed the call."""

    def module(self) -> nn.Module:
        return build(Options(num_groups=2, causal=not self.source, **self.options), **self.more)

    def begin(self, module: nn.Module) -> None:
        module.kv_cache = None
        with torch.no_grad():
            for step, length in enumerate(self.before):
                module(tokens(2, length, 16, seed=step), None, self.mode)
            if self.source:
                module(tokens(2, 1, 16, seed=5), tokens(2, 4, 16, seed=6))

    def call(self, module: nn.Module) -> Tensor:
        x = tokens(2, self.length, 16, seed=40)
        kv = tokens(2, 5, 16, seed=41) if self.source else None
        mask = None if self.spans is None else padding(list(self.spans), self.length)
        kv_mask = padding([(0, 4), (1, 3)], 5) if self.source else None
        with torch.set_grad_enabled(self.grad):
            return module(x, kv, self.mode, attention_mask=mask, kv_mask=kv_mask)

    def next(self, module: nn.Module) -> Tensor:
        with torch.no_grad():
            return module(tokens(2, 1, 16, seed=50), None, self.mode)


SLIDING, SINKS = {"window_size": 3}, {"window_size": 3, "num_sinks": 2}
INT8, INT4 = ({"stored": (kind, kind)} for kind in ("int8", "int4"))
ANY = 4, Random()
ROTARY, ALIBI = {"scheme": SCHEMES["rotary halves"]}, {"scheme": SCHEMES["alibi"]}
CONVERSATIONS = {
    "first call": Conversation(ROTARY, before=()),
    "uniform": Conversation(ROTARY),
    "ragged": Conversation(ALIBI, length=3, spans=((0, 3), (1, 1))),
    "ragged with sinks": Conversation({**ROTARY, **SINKS}, length=3, spans=((0, 1), (1, 2))),
    "sliding": Conversation({**ALIBI, **SLIDING}, before=(3, 1, 1), length=1),
    "sliding with sinks": Conversation({**ROTARY, **SINKS}, before=(3, 3)),
    "first sinks": Conversation(SINKS, before=(1,)),
    "back to the front": Conversation(SLIDING, before=(3,) * 23),
    "sinks, back to the front": Conversation(SINKS, before=(3,) * 23),
    "growth": Conversation(ROTARY, before=(4, 64)),
    "ragged growth": Conversation(before=(4, 64), spans=((0, 2), (0, 1))),
    "long chunk": Conversation({**ROTARY, **SINKS}, before=(3, 1), length=7),
    "long first chunk": Conversation(SINKS, before=(), length=7),
    "ragged long chunk": Conversation(SLIDING, length=7, spans=((0, 7), (1, 3))),
    "begins to slide": Conversation(before=(5,), mode=None, options=SLIDING),
    "static": Conversation(ROTARY, more={"max_cache_length": 8}),
    "static, sliding": Conversation(before=(4, 1, 1), length=1, mode=False, more={"max_cache_length": 6}),
    "int8": Conversation({**ROTARY, **INT8}),
    "int4, ragged with sinks": Conversation({**ROTARY, **SINKS, **INT4}, length=3, spans=((0, 1), (1, 2))),
    "int4, static": Conversation({**ROTARY, **INT4}, more={"max_cache_length": 8}),
    "budget": Conversation(ROTARY, more={"cache_budget": (4, KeyNorm())}),
    "budget, ragged": Conversation({**ALIBI, **SINKS}, length=3, spans=((0, 3), (1, 1)), more={"cache_budget": ANY}),
    "budget of weights": Conversation(ALIBI, more={"cache_budget": (4, AccumulatedAttention(1))}),
    "budget of queries": Conversation(SLIDING, more={"cache_budget": (2, LastQueries(1, 3))}),
    "budget, recorded": Conversation(ROTARY, more={"cache_budget": (4, AccumulatedAttention(1))}, grad=True),
    "recorded": Conversation({**ROTARY, **SINKS}, before=(3, 3), grad=True),
    "recorded ragged": Conversation(ALIBI, spans=((0, 2), (1, 1)), grad=True),
    "cross-attention": Conversation(source=True),
    "first cross-attention": Conversation(source=True, before=()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_exception_at_any_operation_changes_nothing(name: str) -> None:
    """At every single operation: every bit of the cache as before, and once more after a second failure; then the same
    call gives what it would have given at first, and so does the one after it. `pytest -rP` shows the counts."""
    conversation = CONVERSATIONS[name]
    clean, module = conversation.module(), conversation.module()
    conversation.begin(clean)
    with Injected() as counting:
        expected = conversation.call(clean)
    after, following = cache_snapshot(clean), conversation.next(clean)
    assert counting.count >= conversation.least
    torn = 0
    for at in range(counting.count):
        if name == "first call":
            module = conversation.module()  # its table of angles too is made within the call
        conversation.begin(module)
        before = cache_snapshot(module)
        # The second failure comes earlier: tables of angles that the first call made may be there already.
        for where in (at, at // 2):
            with pytest.raises(tuple(ERRORS), match="injected"), Injected(where) as injected:
                conversation.call(module)
            torn += injected.torn
            assert cache_snapshot(module) == before, (at, where)
        assert_same(conversation.call(module), expected, atol=1e-12)
        assert cache_snapshot(module) == after, at
        assert_same(conversation.next(module), following, atol=1e-12)
    assert torn > 0 or name.startswith(("recorded", "budget, recorded", "first cross", "cross"))
    sys.stdout.write(f"{name}: {2 * counting.count} exceptions at {counting.count} operations, {torn} torn writes\n")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SLIDING, SINKS], ids=["expanding", "sliding", "sinks"])
def test_another_call_after_a_torn_write(options: dict) -> None:
    """What a failed call wrote into dead slots is not read by a shorter one, whose rows end apart among them."""
    module, clean = (build(Options(num_groups=2, **options)) for _ in range(2))
    longer, shorter = padding([(0, 3), (0, 3)], 3), padding([(0, 1), (0, 1)], 1)

    def begin(model: nn.Module) -> None:
        model.kv_cache = None
        with torch.no_grad():
            model(tokens(2, 3, 16), attention_mask=padding([(0, 3), (0, 1)], 3))

    def call(model: nn.Module, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens(2, mask.shape[1], 16, seed=1), attention_mask=mask)

    begin(module)
    with Injected() as counting:
        call(module, longer)
    for at in range(counting.count):
        begin(module), begin(clean)
        with pytest.raises(tuple(ERRORS), match="injected"), Injected(at):
            call(module, longer)
        for _ in range(2):
            assert_same(call(module, shorter), call(clean, shorter), atol=1e-12)
            assert cache_snapshot(module) == cache_snapshot(clean)


def test_failures_one_after_the_other_and_a_conversation_in_between() -> None:
    """One module, with a failure before each of its calls at the next operation: the conversation is that without
    failures."""
    for options in ({}, SLIDING, SINKS):
        clean, module = (build(Options(num_groups=2, **options)) for _ in range(2))
        with torch.no_grad():
            for step in range(60):
                x = tokens(2, 1 + step % 4, 16, seed=step)
                mask = padding([(0, x.shape[1]), (0, 1)], x.shape[1]) if step % 5 == 4 else None
                with pytest.raises(tuple(ERRORS), match="injected"), Injected(step % 14):
                    module(x, attention_mask=mask)
                expected = clean(x, attention_mask=mask)
                assert_same(module(x, attention_mask=mask), expected, atol=1e-12)
                assert cache_snapshot(module) == cache_snapshot(clean)
