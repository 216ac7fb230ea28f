"""Places where conversations may wait, files and devices, and times at which they may go there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.blocks.stacks import READERS, cache_snapshots, make
from tests.cache.offloaded import fed, source_of, step
from tests.conversations import assert_same, cache_snapshot
from tests.faults.inject import HookError, failing
from tests.internals import buffers
from tests.models.variants import decoder_only, ids
from tests.oracle import Options
from tests.setups import build, tokens
from tests.simulated_device import DEVICE, OnDevice, counted_waits, on_device
from transformer import KVCache, LayerCache
from transformer.blocks import BlockStack
from transformer.cache import stored
from transformer.errors import (
    ArgumentError,
    CacheStateError,
    ConcurrentUseError,
    DeviceError,
    ForeignFileError,
)


@contextmanager
def simulated() -> Iterator[tuple[BlockStack, KVCache, BlockStack]]:
    """A stack with a conversation on a second device, and its twin on the CPU."""
    stack, clean = make(READERS), make(READERS)
    on_device(stack)
    with counted_waits(), torch.no_grad():
        for seed, length in ((1, 5), (2, 2)):
            x, source = tokens(2, length, 16, seed=seed), tokens(2, 3, 16, seed=9)
            stack(x.to(DEVICE), source=source.to(DEVICE))
            clean(x, source=source)
        yield stack, KVCache.from_model(stack), clean


@pytest.mark.parametrize("target", ["cpu", torch.device("cpu"), "file"])
def test_a_conversation_comes_back_to_its_device(target: str | torch.device, tmp_path: Path) -> None:
    with simulated() as (stack, cache, clean):
        cache.offload(tmp_path / "chat" if target == "file" else target)
        assert (cache.length, cache.nbytes) == (7, 0)
        x, source = tokens(2, 1, 16, seed=3), tokens(2, 3, 16, seed=9)
        out = stack(x.to(DEVICE), source=source.to(DEVICE))
        assert_same(out.cpu(), clean(x, source=source), atol=1e-12)
        assert all(isinstance(tensor, OnDevice) for layer in cache.layers.values() for tensor in buffers(layer))
        assert cache.nbytes > 0


def test_a_conversation_of_the_cpu_waits_on_another_device() -> None:
    stack, cache = fed("readers")
    clean, _ = fed("readers")
    with counted_waits():
        for length, target in enumerate((DEVICE, "lazy:0", "lazy"), 7):
            cache.offload(target).offload(target)
            assert (cache.nbytes, cache.length) == (0, length)
            assert torch.equal(step(stack, "readers"), step(clean, "readers"))
    assert all(tensor.device.type == "cpu" for layer in cache.layers.values() for tensor in buffers(layer))


def test_text_that_torch_knows_is_a_device_and_any_other_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, cache = fed()
    for target in ("cpu", "cpu:0", torch.device("cpu")):
        with pytest.raises(ArgumentError, match="expected another device than that of the kv_cache"):
            cache.offload(target)
    for target in ("meta", torch.device("meta")):
        with pytest.raises(ArgumentError, match=r"expected a device that keeps numbers, got meta; a file is './meta'"):
            cache.offload(target)
    with pytest.raises(DeviceError, match=r"a device of this machine, got xla:3, of which .*; a file is './xla:3'$"):
        cache.offload("xla:3")
    for wrong in (0, None, b"chat", 1.5, open, ["chat"], torch.zeros(1)):
        with pytest.raises(ArgumentError, match="path_or_device: expected the name of a file"):
            cache.offload(wrong)
    assert (list(tmp_path.iterdir()), cache.nbytes > 0) == ([], True)
    for target in ("./cpu", Path("meta"), "chat"):
        cache.offload(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat", "cpu", "meta"]


def test_it_writes_where_save_writes(tmp_path: Path) -> None:
    """A file of something else is not replaced, and a folder that is missing is named: it stays in memory."""
    stack, cache = fed()
    before, held = cache_snapshots(stack), cache.nbytes
    (tmp_path / "notes").write_text("mine")
    for path, error in ((tmp_path / "notes", ForeignFileError), (tmp_path / "no" / "chat", OSError)):
        with pytest.raises(error, match=str(path)):
            cache.offload(path)
    assert (cache.nbytes, cache_snapshots(stack)) == (held, before)
    assert (tmp_path / "notes").read_text() == "mine"


def test_what_carries_a_graph_is_refused(tmp_path: Path) -> None:
    stack = make(READERS)
    stack(tokens(2, 5, 16), source=tokens(2, 3, 16, seed=9))
    cache = KVCache.from_model(stack)
    for target in (tmp_path / "chat", "cpu"):
        with pytest.raises(CacheStateError, match=r"without gradients .* in blocks.0.attention; detach\(\) it first"):
            cache.offload(target)
    before = cache_snapshots(stack)
    cache.detach().offload(tmp_path / "chat")
    assert cache_snapshots(stack) == before


def test_it_is_refused_inside_a_call(tmp_path: Path) -> None:
    """Of the model or of a generation: that of the view at once, and for one of a layer the call at its end."""
    model, prompt = decoder_only().eval().enable_cache(), ids(1, 4)
    with torch.no_grad():
        model(prompt)
    attention = model.get_submodule(next(iter(KVCache.from_model(model).layers)))
    before, refused = cache_snapshot(attention), []

    def of_the_view(*_: object) -> None:
        with pytest.raises(ConcurrentUseError):
            KVCache.from_model(model).offload(tmp_path / "chat")
        refused.append(True)

    def of_the_layer(*_: object) -> None:
        attention.kv_cache.offload(tmp_path / "layer")

    for call in (partial(model, ids(1, 1)), partial(model.generate, ids(1, 1), max_new_tokens=2)):
        handle = attention.q_proj.register_forward_hook(of_the_layer)
        with torch.no_grad(), pytest.raises(ConcurrentUseError):
            call()
        handle.remove()
        assert cache_snapshot(attention) == before
    with attention.q_proj.register_forward_hook(of_the_view), torch.no_grad():
        call()
    assert len(refused) >= 2
    assert not (tmp_path / "chat").exists()


def test_a_call_that_comes_in_between_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another thread, while the file is written."""
    module = build(Options(num_groups=2))
    with torch.no_grad():
        module(tokens(2, 4, 16))
    monkeypatch.setattr(stored, "replace_file", lambda *_: module(tokens(2, 1, 16)).sum())
    with pytest.raises(ConcurrentUseError), torch.no_grad():
        module.kv_cache.offload(tmp_path / "layer")
    assert (module.kv_cache.length, module.kv_cache["key"].shape[2]) == (5, 5)


@pytest.mark.parametrize("error", [None, HookError])
def test_a_transaction_undoes_it(error: type[Exception] | None, tmp_path: Path) -> None:
    """A step, an offload and another step of which the last fails; no file is read to undo them."""
    clean, _ = fed()
    stack, cache = fed()
    expected = step(clean), step(clean, seed=4)
    with cache.transaction():
        assert torch.equal(step(stack), expected[0])
        cache.offload(tmp_path / "chat")
        if error is None:
            assert torch.equal(step(stack, seed=4), expected[1])
    if error is None:
        assert cache_snapshots(stack) == cache_snapshots(clean)
    before = cache_snapshots(stack)

    def fails() -> None:
        with cache.transaction(), failing(stack.blocks[-1], "register_forward_pre_hook"):
            with torch.no_grad():
                cache.truncate(7)
            cache.offload(tmp_path / "chat")
            (tmp_path / "chat").unlink()
            raise HookError

    for _ in range(2):
        with pytest.raises(HookError):
            fails()
        assert (cache_snapshots(stack), cache.nbytes > 0) == (before, True)
    assert torch.equal(step(stack, seed=5), step(clean, seed=5)) is (error is None)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_goes_and_comes_in_any_mode(mode: type, tmp_path: Path) -> None:
    """What came back in inference mode may be used in a recorded call."""
    clean, _ = fed("readers")
    stack, cache = fed("readers")
    with mode():
        cache.offload(tmp_path / "chat")
        stack.blocks[0].attention.kv_cache["key"]
    with torch.device("meta"):
        stack.blocks[1].attention.kv_cache["key"]
    x, source = tokens(2, 1, 16, seed=3), source_of("readers")
    out = stack(x, **source)
    out.sum().backward()
    assert_same(out, clean(x, **source), atol=1e-12)


def test_threads_bring_back_one_and_the_same(tmp_path: Path) -> None:
    module = build(Options(num_groups=2))
    with torch.no_grad():
        module(tokens(2, 40, 16))
    cache = module.kv_cache
    for _ in range(20):
        cache.offload(tmp_path / "layer")
        found, start = [], threading.Barrier(4)

        def read(found: list = found, start: threading.Barrier = start) -> None:
            start.wait()
            found.append(cache.contents)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert all(contents is cache.contents for contents in found)


def test_a_cache_that_is_half_made_has_no_contents() -> None:
    half = LayerCache.__new__(LayerCache)
    for name in ("contents", "spec", "anything"):
        with pytest.raises(AttributeError, match=name):
            getattr(half, name)


@pytest.mark.slow
def test_a_frozen_layout_comes_back_in_order(tmp_path: Path) -> None:
    """A compiled step then runs eagerly, or says so where it may not; frozen again it is compiled."""
    x, outs = tokens(2, 12, 16), []
    for away in (False, True):
        module = build(Options(num_groups=2, window_size=4, num_sinks=1), max_cache_length=20).eval()
        torch._dynamo.reset()
        with torch.no_grad():
            out = [module(x[:, :6])]
            module.kv_cache.freeze_layout()
            compiled = torch.compile(module, backend="eager")
            whole = torch.compile(module, backend="eager", fullgraph=True)
            out += [whole(x[:, step : step + 1]) for step in (6, 7)]
            if away:
                module.kv_cache.offload(tmp_path / "layer")
                with pytest.raises(torch._dynamo.exc.Unsupported, match="freeze_layout"):
                    whole(x[:, 8:9])
                assert module.kv_cache.nbytes == 0
            out.append(compiled(x[:, 8:9]))
            module.kv_cache.offload(tmp_path / "layer").freeze_layout()
            out += [whole(x[:, step : step + 1]) for step in (9, 10, 11)]
        outs.append(torch.cat(out, 1))
    assert_same(*outs)
