"""Switch of the compiled kernels: what leaves them out."""

from __future__ import annotations

import pytest

from transformer.kernels.compiled import switch


def available() -> bool:
    return switch.are_available.__wrapped__()


@pytest.fixture(autouse=True)
def _all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(switch.VARIABLE, raising=False)
    monkeypatch.delenv("NUMBA_CPU_NAME", raising=False)
    monkeypatch.setattr(switch, "find_spec", lambda _name: object())
    monkeypatch.setattr(switch.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def test_the_variable_and_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available()
    monkeypatch.setenv(switch.VARIABLE, "0")
    assert not available()
    monkeypatch.delenv(switch.VARIABLE)
    monkeypatch.setattr(switch, "find_spec", lambda _name: None)
    assert not available()


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
