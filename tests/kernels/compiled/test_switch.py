"""Switch of the compiled kernels: what leaves them out."""

from __future__ import annotations

import builtins
import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.internals import without_compiled_kernels
from transformer import GroupQueryAttention
from transformer.blocks import RMSNorm
from transformer.kernels.compiled import switch
from transformer.positions import RotaryEmbedding


def available() -> bool:
    return switch.are_available.__wrapped__()


def use_numba(monkeypatch: pytest.MonkeyPatch, disabled: int = 0, version: tuple[int, int] = (0, 61)) -> None:
    """What `import numba` gives from now on."""
    config, name = SimpleNamespace(DISABLE_JIT=disabled), "{}.{}.0".format(*version)
    stand_in = SimpleNamespace(config=config, version_info=SimpleNamespace(short=version), __version__=name)
    monkeypatch.setitem(sys.modules, "numba", stand_in)


@pytest.fixture(autouse=True)
def _all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(switch.VARIABLE, raising=False)
    monkeypatch.delenv("NUMBA_CPU_NAME", raising=False)
    monkeypatch.setattr(switch, "find_spec", lambda _name: object())
    use_numba(monkeypatch)
    monkeypatch.setattr(switch.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def test_the_variable_and_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available()
    monkeypatch.setenv(switch.VARIABLE, "0")
    assert not available()
    monkeypatch.delenv(switch.VARIABLE)
    monkeypatch.setattr(switch, "find_spec", lambda _name: None)
    assert not available()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"disabled": 1}, "NUMBA_DISABLE_JIT is set"),
        ({"version": (0, 60)}, "expected version 0.61 or later, got 0.60.0"),
        (None, "importing it failed: Numba needs NumPy 2.4 or less"),
    ],
)
@torch.no_grad()
def test_a_numba_that_cannot_be_used_is_left_out(
    given: dict | None, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once told; attention, norms and projections go on by PyTorch's ways."""
    module = GroupQueryAttention(512, 4, 2, position=RotaryEmbedding(128), qk_norm=RMSNorm).bfloat16()
    x = torch.randn(1, 2, 512).bfloat16()
    with monkeypatch.context() as patch:
        without_compiled_kernels(patch)
        right = module(x)
    if given is None:
        monkeypatch.delitem(sys.modules, "numba")
        monkeypatch.setattr(builtins, "__import__", refuse_numba(builtins.__import__))
    else:
        use_numba(monkeypatch, **given)
    switch.are_available.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "transformer.kernels"):
            outs = [module(x) for _ in range(2)]
        assert not switch.are_available()
    finally:
        switch.are_available.cache_clear()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith(reason)
    for out in outs:
        assert torch.equal(out, right)


def refuse_numba(import_module):
    def refusing(name, *rest, **options):
        if name == "numba":
            raise ImportError("Numba needs NumPy 2.4 or less")
        return import_module(name, *rest, **options)

    return refusing


@torch.no_grad()
def test_numba_is_asked_for_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes a while: calls that no kernel computes, such as those with gradients, do without."""
    asked = []
    monkeypatch.setattr(switch, "are_available", lambda: asked.append(True) or False)
    module = GroupQueryAttention(512, 4, 2, position=RotaryEmbedding(128), qk_norm=RMSNorm)
    x = torch.randn(1, 2, 512)
    with torch.enable_grad():
        module(x)
    module.to("meta")(x.to("meta"))
    assert not asked
    GroupQueryAttention(512, 4, 2)(x)
    assert asked


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_x86_without_float16_is_left_out(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM would call a function that is not there, and numba's compiler ends the process."""
    monkeypatch.setattr(switch.platform, "machine", lambda: machine)
    other = machine != "x86_64"
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert available() == other
    monkeypatch.delenv("NUMBA_CPU_NAME")
    monkeypatch.setattr(switch.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert available() == other


def test_unknown_processors_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, expected in {"riscv64": False, "ppc64le": False, "i686": False, "arm64": True, "AMD64": True}.items():
        monkeypatch.setattr(switch.platform, "machine", lambda machine=machine: machine)
        assert available() is expected, machine
