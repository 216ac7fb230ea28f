"""Buffers: number of allocations, sizes, and contents after growth."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.internals import buffers
from tests.oracle import Options
from tests.setups import build, padding, tokens
from tests.storages import address

BYTES = 4
PER_TOKEN = 2 * 4 * 4 * BYTES
"""Keys and values of four heads of four features, in float32."""


def small(**options: object) -> nn.Module:
    return build(Options(**options), dtype=torch.float32)


def feed(module: nn.Module, length: int, seed: int = 0, batch: int = 1) -> Tensor:
    return module(tokens(batch, length, 16, seed=seed, dtype=torch.float32))


def alive() -> dict[int, int]:
    """All memory that some dense tensor of this process keeps alive: address to bytes."""
    gc.collect()
    # A sparse tensor, which another test of the process may have made, has no storage.
    dense = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.layout is torch.strided]
    found = [tensor.untyped_storage() for tensor in dense]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def kept_since(before: dict[int, int]) -> int:
    """Bytes that are alive now and were not before."""
    return sum(size for address, size in alive().items() if address not in before)


def capacity(view: Tensor) -> int:
    """Slots of the buffer that a view [B, G, S, D] shows the first S of."""
    rows, groups, _, head_dim = view.shape
    return view.untyped_storage().nbytes() // (rows * groups * head_dim * BYTES)


def test_growth_is_amortised() -> None:
    """Issues: foundation-model-stack#84, transformers#30536. A concatenation per step. Over 1,000 tokens one by one the
    key buffer is made anew about log2(1,000) times, and all copies together are a few times what is held."""
    module, made, copied, last = small(), 0, 0, None
    with torch.no_grad():
        for _ in range(1000):
            module(tokens(1, 1, 16, dtype=torch.float32))
            # Kept, so that no later buffer can have its address.
            key = module.kv_cache["key"]
            if last is None or address(key) != address(last):
                made, copied, last = made + 1, copied + capacity(key), key
    assert made <= 6
    assert copied <= 3 * 2 * 1000
    assert module.kv_cache.cached_length == 1000
    assert 1000 * PER_TOKEN <= module.kv_cache.nbytes <= 2 * 1000 * PER_TOKEN + 64 * PER_TOKEN


def test_a_full_window_is_made_anew_now_and_then() -> None:
    """Issues: transformers sliding cache. A concatenation per step. Once full, a window goes to a fresh buffer (a slot
    that was written is never rewritten, so that a step can be taken back) once in as many tokens as it has room besides
    its own, and its bytes stand still."""
    module, made, last = small(window_size=16, num_sinks=2), 0, None
    with torch.no_grad():
        feed(module, 40)
        sizes = {module.kv_cache.nbytes}
        for step in range(300):
            feed(module, 1, step)
            key = buffers(module.kv_cache)[0]
            made, last = made + (key is not last), key
            sizes.add(module.kv_cache.nbytes)
    assert made - 1 <= 300 / (16 + 64) + 1
    assert len(sizes) == 1


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("prompt", [4000, 3])
@pytest.mark.parametrize("sinks", [0, 1])
def test_a_window_keeps_no_hidden_buffer_alive(sinks: int, prompt: int, grad: bool) -> None:
    """Issues: transformers sliding cache. 80,000 B stayed alive for 56 B held. After a long prompt neither the cache
    nor the allocator holds more than a window needs, and `nbytes` says all of it."""
    module, before = small(window_size=8, num_sinks=sinks), alive()
    with torch.set_grad_enabled(grad):
        for length in (prompt, 1):
            feed(module, length)
            module.kv_cache.detach()
            cache = module.kv_cache
            assert cache.nbytes == kept_since(before)
            assert cache.nbytes_used == cache.cached_length * PER_TOKEN == min(cache.length, 8 + sinks) * PER_TOKEN
            assert cache.nbytes <= (2 * 8 + 64 + sinks) * PER_TOKEN


@pytest.mark.parametrize("event", ["slides", "grows", "clear", "forgotten", "records gradients"])
def test_released_buffers_are_freed_at_once(event: str) -> None:
    """Issues: transformers#30536, transformers sliding cache. A large buffer stayed alive behind a small one. Where the
    cache releases a buffer, nothing else holds it, not even until the next run of the garbage collector."""
    module = small(window_size=8)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            module(tokens(1, 3000, 16, dtype=torch.float32), None, True)
            module(tokens(1, 1, 16, dtype=torch.float32), None, True)
            watch = weakref.ref(buffers(module.kv_cache)[0])
            assert module.kv_cache.nbytes >= 3000 * PER_TOKEN
            if event == "slides":
                feed(module, 1)
            elif event == "grows":
                module(tokens(1, 3000, 16, dtype=torch.float32), None, True)
            elif event == "clear":
                module.kv_cache.clear()
            elif event == "forgotten":
                module.kv_cache = None
        if event == "records gradients":
            feed(module, 1)
        assert watch() is None
    finally:
        gc.enable()


def test_nbytes_is_what_is_alive() -> None:
    """Issues: transformers#30536, foundation-model-stack#84. `nbytes` equals the memory of the real buffers at every
    moment, of equal rows and of rows apart, growing, sliding, moved, copied and detached."""
    for options in ({}, {"window_size": 5, "num_sinks": 2}):
        module, before = small(**options), alive()
        with torch.no_grad():
            for step in range(24):
                mask = padding([(0, 3), (1, 1)], 3) if step % 4 == 3 else None
                module(tokens(2, 3, 16, dtype=torch.float32), attention_mask=mask)
                if step == 20:
                    module.kv_cache.detach()
                del mask
                cache = module.kv_cache
                assert cache.nbytes_used == int(cache.cached_lengths.sum()) * PER_TOKEN <= cache.nbytes
                if step in (9, 21):
                    assert cache.nbytes == kept_since(before)
    assert module.kv_cache.clear().nbytes == module.kv_cache.nbytes_used == 0


@pytest.mark.parametrize("ragged", [False, True], ids=["equal rows", "rows apart"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_growing_scrambles_nothing(groups: int, ragged: bool) -> None:
    """Issues: nanochat#186. Growing by `resize_` scrambled the heads. After every step what is held is bit for bit what
    was held before and the new tokens' own keys and values, for rows, heads and features that all differ."""
    module = small(num_groups=groups)
    fed: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
    projected: dict[str, Tensor] = {}
    for name in ("k_proj", "v_proj"):
        layer = getattr(module, name)
        layer.register_forward_hook(lambda _module, _inputs, out, name=name: projected.update({name: out.clone()}))
    capacities = set()
    with torch.no_grad():
        for step in range(60):
            length = (1, 7, 2)[step % 3]
            counts = [length, max(length - 1, 0), length // 2] if ragged else [length] * 3
            mask = padding([(0, count) for count in counts], length) if ragged else None
            module(tokens(3, length, 16, seed=step, dtype=torch.float32), attention_mask=mask)
            keys, values = (projected[name].unflatten(-1, (groups, 4)) for name in ("k_proj", "v_proj"))
            for row, count in enumerate(counts):
                fed[row] += [(keys[row, i], values[row, i]) for i in range(count)]
            capacities.add(module.kv_cache.nbytes)
            for index, name in enumerate(("key", "value")):
                held = module.kv_cache[name]
                for row, row_fed in enumerate(fed):
                    own = torch.stack([token[index] for token in row_fed], 1) if row_fed else held[row, :, :0]
                    assert torch.equal(held[row, :, : len(row_fed)], own), (step, row, name)
                    assert not held[row, :, len(row_fed) :].any()
    assert len(capacities) >= 3, "it did grow"


def test_growing_changes_no_output() -> None:
    """Issues: nanochat#186. The same told by the outputs, across every growth of the first 300 tokens."""
    module, plain = small(num_groups=2), small(num_groups=2, cached=False)
    x = tokens(2, 300, 16, dtype=torch.float32)
    with torch.no_grad():
        outputs = torch.cat([module(x[:, i : i + 3]) for i in range(0, 300, 3)], dim=1)
        assert_same(outputs, plain(x), atol=1e-5)
