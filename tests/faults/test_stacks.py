"""Stacks of layers under the faults of this folder: empty chunks, NaN, changing modes, two threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import pytest
import torch
from torch import Tensor

from tests.blocks.stacks import MIXED, READERS, WITH_SINKS, cache_snapshots, make
from tests.conversations import NAN, assert_same
from tests.setups import padding, tokens
from transformer import KVCache
from transformer.blocks import BlockStack
from transformer.errors import ConcurrentUseError

STACKS = {"mixed": MIXED, "with sinks": WITH_SINKS, "readers": READERS}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def call(stack: BlockStack, x: Tensor, mask: Tensor | None = None, mode: bool | None = None) -> Tensor:
    reads = any(block.cross_attention is not None for block in stack.blocks)
    source = {"source": tokens(len(x), 4, 16, seed=9)} if reads else {}
    return stack(x, expanding_context=mode, attention_mask=mask, **source)


@pytest.mark.slow
@pytest.mark.parametrize("grad", MODES)
@pytest.mark.parametrize("name", STACKS)
def test_a_chunk_without_a_token(name: str, grad: str) -> None:
    """No tokens, or padding alone, in every mode, before and between the others: no layer's own tokens move."""
    for mode in (None, True, False):
        stack, straight = make(STACKS[name]), make(STACKS[name])
        with MODES[grad]():
            for seed, length in enumerate((3, 1, 4)):
                assert call(stack, tokens(2, 0, 16), None, mode).shape == (2, 0, 16)
                call(stack, tokens(2, 2, 16), padding([(0, 0), (0, 0)], 2), mode)
                assert KVCache.from_model(stack).length == KVCache.from_model(straight).length
                x = tokens(2, length, 16, seed=seed)
                assert torch.equal(call(stack, x, None, mode), call(straight, x, None, mode))
        assert cache_snapshots(stack) == cache_snapshots(straight)


@pytest.mark.parametrize("name", STACKS)
def test_nan_in_one_row(name: str) -> None:
    """In a real token, which affects its own row only, and in padding, which affects nothing: other rows are equal bit
    for bit."""
    clean, dirty = make(STACKS[name]), make(STACKS[name])
    with torch.no_grad():
        for seed, length in enumerate((4, 1, 5, 1)):
            x = tokens(3, length, 16, seed=seed)
            mask = padding([(0, length), (0, length), (length - 1, 1)], length)
            spoiled = x.masked_fill(~mask[..., None], NAN)
            spoiled[1, 0] = NAN
            expected, out = call(clean, x, mask), call(dirty, spoiled, mask)
            assert torch.equal(out[mask][[0, -1]], expected[mask][[0, -1]])
            assert torch.equal(out[0], expected[0])
            assert out[1].isnan().any()


@pytest.mark.parametrize("name", STACKS)
def test_modes_alternate(name: str) -> None:
    """train and eval, grad, no_grad and inference_mode between calls, over a source that is kept and forgotten again:
    each call as without a cache."""
    stack, plain, said = make(STACKS[name]), make(STACKS[name], cached=False), tokens(2, 0, 16)
    for seed, (grad, length) in enumerate(zip(cycle(["no_grad", "grad", "inference", "grad", "inference"]), range(12))):
        stack.train(seed % 3 == 0)
        x = tokens(2, 1 + length % 4, 16, seed=seed)
        said = torch.cat((said, x), 1)
        with MODES[grad]():
            out = call(stack, x)
        assert out.requires_grad == (grad == "grad")
        with torch.no_grad():
            assert_same(out.detach(), call(plain, said)[:, -x.shape[1] :])


@pytest.mark.parametrize("name", STACKS)
def test_the_second_of_two_threads_is_refused(name: str) -> None:
    """While the first is held in the last layer: the second, whose layers below would have moved on, changes nothing;
    then the first comes through as if alone."""
    stack, clean = make(STACKS[name]), make(STACKS[name])
    prompt, x = tokens(2, 4, 16), tokens(2, 1, 16, seed=1)
    with torch.no_grad():
        call(stack, prompt), call(clean, prompt)
        expected = call(clean, x)
    reached, opened = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        handle.remove()
        reached.set()
        assert opened.wait(60)

    handle = stack.blocks[-1].attention.q_proj.register_forward_pre_hook(hold)

    def first() -> Tensor:
        with torch.no_grad():
            return call(stack, x)

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(first)
        assert reached.wait(60)
        before = cache_snapshots(stack)
        try:
            with torch.no_grad(), pytest.raises(ConcurrentUseError):
                call(stack, tokens(2, 1, 16, seed=2))
            assert cache_snapshots(stack) == before
        finally:
            opened.set()
        assert torch.equal(running.result(60), expected)
    assert cache_snapshots(stack) == cache_snapshots(clean)
