"""Memory of forks: a thousand forks of one prompt share its memory until they write."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from tests.blocks.stacks import Layer, make
from tests.conversations import assert_same
from tests.internals import buffers
from tests.setups import tokens
from transformer import KVCache
from transformer.blocks import BlockStack

FORKS, PROMPT = 1000, 200
LAYERS = (Layer(None, groups=2), Layer(8, 2), Layer(4, groups=1, reads=True))
"""One that sees everything, a window with sinks, a window that reads a source."""


def alive(caches: Iterable[KVCache]) -> dict[int, int]:
    """Bytes of every storage that these conversations keep alive, by where it lies: each counted once."""
    found = {}
    for cache in caches:
        for layer in cache.layers.values():
            storages = [tensor.untyped_storage() for tensor in buffers(layer)]
            found.update({storage.data_ptr(): storage.nbytes() for storage in storages})
    return found


@torch.no_grad()
def answer(stack: BlockStack, cache: KVCache, x: Tensor, source: Tensor) -> Tensor:
    cache.install(stack)
    out = stack(x, source)
    cache.remove(stack)
    return out


@pytest.mark.slow
def test_a_thousand_forks_cost_the_prompt_once() -> None:
    """Live bytes, by storage. Forks that write copy their own tokens once; a further fork, the prompt's own
    conversation and a fork of a fork give the right outputs."""
    stack, plain = make(LAYERS), make(LAYERS, cached=False)
    x, source = tokens(1, PROMPT + 4, 16), tokens(1, 6, 16, seed=9)
    prompt = KVCache.from_model(stack).remove(stack)
    answer(stack, prompt, x[:, :PROMPT], source)
    own = alive([prompt])
    forks = [prompt.fork() for _ in range(FORKS)]
    assert alive([prompt, *forks]) == own
    assert sum(own.values()) == prompt.nbytes

    written = forks[::100]
    for number, fork in enumerate(written):
        chunks = [tokens(1, 2, 16, seed=100 + number), tokens(1, 2, 16, seed=200 + number)]
        before, outs, copies = alive([prompt, *forks]), [], []
        for chunk in chunks:
            outs.append(answer(stack, fork, chunk, source))
            copies.append(alive([fork]).keys() - own.keys())
        # Keys and values of each layer, and its sinks; the source is never copied. The second step copies nothing.
        assert len(copies[0]) == 2 + 4 + 2
        assert copies[1] == copies[0]
        assert alive([prompt, *forks]).keys() - before.keys() == copies[0]
        assert_same(torch.cat(outs, 1), whole(plain, torch.cat((x[:, :PROMPT], *chunks), 1), source)[:, PROMPT:])
    assert alive([prompt, *(fork for fork in forks if fork not in written)]) == own
    sys.stdout.write(
        f"{FORKS} forks of {sum(own.values())} bytes: {sum(own.values())} bytes alive; after {len(written)} of them "
        f"have written: {sum(alive([prompt, *forks]).values())}\n"
    )

    expected = whole(plain, x, source)[:, PROMPT:]
    for fork in (prompt.fork(), forks[1], forks[2].fork(), prompt):
        assert_same(answer(stack, fork, x[:, PROMPT:], source), expected)
    assert all(fork.length == PROMPT for fork in forks[3:100])


def whole(plain: nn.Module, x: Tensor, source: Tensor) -> Tensor:
    with torch.no_grad():
        return plain(x, source)
