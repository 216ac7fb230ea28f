"""Fixtures of several files."""

from __future__ import annotations

import pytest
import torch

from tests.internals import without_compiled_kernels


@pytest.fixture(params=["float64", "float32", "float32 without numba"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """float32 is read by the compiled kernel where there is one, float64 by PyTorch's."""
    if "without" in request.param:
        without_compiled_kernels(monkeypatch)
    return torch.float64 if request.param == "float64" else torch.float32
