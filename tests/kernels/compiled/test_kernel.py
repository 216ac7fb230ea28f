"""A kernel that is compiled at its first use: told, kept on disk, compiled anew for other sources, or in memory."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable

import numba
import pytest
import torch
from torch import nn

from transformer import DecoderOnlyTransformer
from transformer.errors import ArgumentError
from transformer.kernels import few_queries, few_rows, norms, rotation, tuned, warm_up
from transformer.kernels.compiled import CompiledKernel, are_available, kernel, switch

pytestmark = pytest.mark.skipif(not are_available(), reason="numba is missing, or turned off")


class Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.came = "", threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.message = record.getMessage()
        self.came.set()


@pytest.fixture
def told():
    handler, logger = Told(), logging.getLogger("transformer.kernels")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


class Callback:
    address = 1


def test_a_kernel_that_takes_long_says_so(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is compiled, not afterwards."""
    monkeypatch.setattr(kernel, "SLOW_SECONDS", 0.0)

    def build() -> Callback:
        assert told.came.wait(30)
        return Callback()

    CompiledKernel("of a test", build).load()
    assert "loading the CPU kernel of a test" in told.message
    assert "warm_up(model)" in told.message


def test_it_is_built_once() -> None:
    built = []
    one = CompiledKernel("of a test", lambda: built.append(1) or Callback())
    assert one.load() is one.load()
    assert built == [1]


def test_a_loaded_kernel_has_compiled_its_launches() -> None:
    """For the lengths that it names; otherwise the first call would, without a word in the log."""
    signatures = kernel.launcher().signatures
    CompiledKernel("of a test", Callback, lengths=(41, 43)).load()
    added = [signature[3].count for signature in kernel.launcher().signatures if signature not in signatures]
    assert sorted(added) == [41, 43]


@torch.inference_mode()
def test_kernels_are_loaded_for_what_a_model_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections of one, two and three weights, attention, norms and rotation."""
    model = DecoderOnlyTransformer(20, 256, 2, 256, 1).eval().bfloat16()
    warm_up(model)
    dtype = torch.bfloat16
    kernels = few_queries.KERNEL, few_rows.KERNELS[dtype, dtype], norms.KERNELS[dtype], rotation.KERNELS[dtype]
    called = set()

    def recorded(one: CompiledKernel) -> Callable[..., None]:
        run = one.run

        def record(threads: int, numbers: tuple[int, ...]) -> None:
            called.add((one.name.split(" of ")[0], len(numbers)))
            assert len(numbers) in one.lengths, one.name
            run(threads, numbers)

        return record

    for one in kernels:
        monkeypatch.setattr(one, "run", recorded(one))
    with tuned(min_few_rows_weights=1, min_half_few_rows_weights=1):
        model(torch.randint(20, (1, 3)))
    few = {("few rows", 14), ("few rows", 20), ("few rows", 26)}
    assert called == few | {("attention", 2), ("RMS norm", 9), ("rotation", 24)}


def test_a_kernel_that_fails_to_build_is_tried_again() -> None:
    answers = [None, Callback()]
    one = CompiledKernel("of a test", lambda: answers.pop(0))
    with pytest.raises(AttributeError):
        one.load()
    one.load()


def test_where_no_folder_can_be_written_it_is_compiled_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cfunc(_signature, **options):
        asked.append(options.get("cache", False))
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'f': no locator available")
        return lambda function: function

    monkeypatch.setattr(numba, "cfunc", cfunc)

    def function(numbers) -> None: ...

    assert kernel.compiled_callback(function, "f") is function
    assert asked == [True, False]


@pytest.mark.slow
def test_the_package_does_not_import_numba() -> None:
    """Nor does a call that no kernel computes."""
    program = "import sys, transformer, torch; transformer.MultiHeadAttention(8, 2)(torch.ones(1, 2, 8)); "
    program += "assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True)])
def test_the_variable_leaves_the_kernels_out(value: str, expected: bool) -> None:
    program = f"from transformer.kernels.compiled import are_available; assert are_available() is {expected}"
    subprocess.run([sys.executable, "-c", program], check=True, env={switch.VARIABLE: value, "PATH": "", **path()})


def path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(filter(None, sys.path))}


def test_warm_up_loads_what_a_model_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(CompiledKernel, "load", lambda self: loaded.append(self.name))
    warm_up(DecoderOnlyTransformer(20, 16, 2, 32, 1).bfloat16())
    assert any("bfloat16" in name for name in loaded)
    assert not any("float32" in name for name in loaded)
    assert "attention of few queries" in loaded
    assert not any("encoding" in name for name in loaded)
    loaded.clear()
    warm_up(DecoderOnlyTransformer(20, 16, 2, 32, 1).bfloat16().enable_cache(cache_dtype=("int8", None)))
    assert [name for name in loaded if "encoding" in name] == ["encoding of torch.bfloat16"]
    loaded.clear()
    warm_up(nn.Identity())
    assert loaded == []
    with pytest.raises(ArgumentError, match=r"^model: expected an nn\.Module, got str"):
        warm_up("model")


def test_warm_up_without_numba_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "KERNELS", {})
    monkeypatch.setattr("transformer.kernels.warming.are_available", lambda: False)
    warm_up(nn.Linear(4, 4, dtype=torch.bfloat16))
