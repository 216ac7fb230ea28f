"""Stack in the middle of a conversation: copied, pickled, moved, saved as weights; and compiled without caches."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.blocks.stacks import MIXED, READERS, WITH_SINKS, cache_snapshots, make, run_chunks
from tests.conversations import assert_same
from tests.setups import padding, tokens
from transformer.blocks import BlockStack

STACKS = {"mixed": MIXED, "with sinks": WITH_SINKS, "readers": READERS}
COPIES: dict[str, Callable[[BlockStack], BlockStack]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda stack: pickle.loads(pickle.dumps(stack)),
}


def source_of(name: str, dtype: torch.dtype = torch.float64) -> dict:
    return {"source": tokens(2, 4, 16, seed=9, dtype=dtype)} if name == "readers" else {}


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("scheme", ["rotary halves", "t5 causal"])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", STACKS)
def test_copies_go_on_apart(name: str, way: str, scheme: str, grad: bool) -> None:
    """Between any two calls: the copy answers as the stack does, and neither notices the other. One position object
    still serves all layers of the copy, and a plan of the copy is shared as before."""
    stack, straight, source = make(STACKS[name], scheme), make(STACKS[name], scheme), source_of(name)
    with torch.set_grad_enabled(grad):
        for step, length in enumerate((4, 1, 2, 1)):
            x, mask = tokens(2, length, 16, seed=step), padding([(0, length), (0, 1)], length)
            expected = straight(x, attention_mask=mask, **source)
            other, before = COPIES[way](stack), cache_snapshots(stack)
            assert_same(other(x, attention_mask=mask, **source), expected, atol=1e-12)
            assert cache_snapshots(stack) == before
            assert_same(stack(x, attention_mask=mask, **source), expected, atol=1e-12)
            assert len({id(block.attention.position) for block in other.blocks}) == 1
            stack = other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STACKS)
def test_a_stack_that_changes_its_dtype_between_calls(name: str, dtype: torch.dtype) -> None:
    """`.to(dtype)` takes every layer's cache along: the next calls are those of a stack that was of that dtype, up to
    what its dtype can hold, and the way back works too."""
    stack, straight = make(STACKS[name]), make(STACKS[name])
    bound = 1e-5 if dtype == torch.float32 else 0.25
    with torch.no_grad():
        for step, now in enumerate((torch.float64, dtype, dtype, torch.float64, dtype)):
            stack.to(now)
            assert {block.attention.kv_cache["key"].dtype for block in stack.blocks if step} in ({now}, set())
            x = tokens(2, 2, 16, seed=step)
            out = stack(x.to(now), **source_of(name, now))
            assert out.dtype == now
            assert_same(out.double(), straight(x, **source_of(name)), atol=bound)
    lengths = [block.attention.kv_cache.length for block in stack.blocks]
    assert lengths == [10] * 3


@pytest.mark.parametrize("name", STACKS)
def test_caches_are_no_weights(name: str) -> None:
    """A conversation adds nothing to the state dict, and loading weights does not change it."""
    stack, source = make(STACKS[name]), source_of(name)
    names = list(stack.state_dict())
    with torch.no_grad():
        stack(tokens(2, 4, 16), **source)
        assert list(stack.state_dict()) == names
        before = cache_snapshots(stack)
        stack.load_state_dict(make(STACKS[name]).state_dict())
        assert cache_snapshots(stack) == before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), [("with sinks", "rotary halves"), ("readers", "t5 causal")])
def test_without_caches_it_is_one_graph(name: str, scheme: str) -> None:
    """`fullgraph=True`, for one length and then another."""
    torch._dynamo.reset()
    stack, source = make(STACKS[name], scheme, cached=False), source_of(name)
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    with torch.no_grad():
        for length in (6, 4):
            x = tokens(2, length, 16, seed=length)
            assert_same(compiled(x, **source), stack(x, **source))


@pytest.mark.slow
def test_with_caches_it_runs_eagerly_and_answers_right() -> None:
    """A whole step stays all or nothing, so nothing of it is compiled, and nothing anew for each token."""
    torch._dynamo.reset()
    stack, straight, counter = make(WITH_SINKS), make(WITH_SINKS), CompileCounter()
    compiled = torch.compile(stack, backend=counter)
    x = tokens(2, 6, 16)
    with torch.no_grad():
        assert_same(run_chunks(compiled, x, (4, 1, 1)), run_chunks(straight, x, (4, 1, 1)))
    assert counter.frame_count == 0
    assert cache_snapshots(stack) == cache_snapshots(straight)
