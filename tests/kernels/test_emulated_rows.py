"""Up to 64 rows of a 16-bit dtype that the processor multiplies as float32, by compiled tiles, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transformer.kernels import few_rows, tuned
from transformer.kernels.compiled import are_available
from transformer.kernels.few_rows import project_few_rows

pytestmark = pytest.mark.skipif(not are_available(), reason="numba is missing, or turned off")

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a step of each dtype, as a share of the largest result."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 9, 16, 63, 64])
@pytest.mark.parametrize(("width", "outputs"), [(96, 7), (512, 130), (100, 12), (10_000, 6)])
@torch.no_grad()
def test_rows_of_an_emulated_dtype(
    dtype: torch.dtype, rows: int, width: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than few, in tiles: blocks that end within a tile, and widths that fill no vector."""
    monkeypatch.setattr(few_rows, "EMULATED_DTYPES", {dtype})
    layers = tuple(nn.Linear(width, number, dtype=dtype) for number in (outputs, 3))
    x = torch.randn(rows, 1, width, dtype=dtype)
    for threads in (1, 2):
        with tuned(min_parallel_bytes=0 if threads == 2 else 1 << 40):
            outs = project_few_rows(layers, x)
        for layer, out in zip(layers, outs, strict=True):
            right = x.double() @ layer.weight.double().T + layer.bias.double()
            assert (out.double() - right).abs().max() <= (ROUNDING[dtype] + 1e-6) * right.abs().max()


@torch.no_grad()
def test_max_emulated_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(64, 64, dtype=torch.bfloat16), torch.randn(1, 65, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(few_rows, "EMULATED_DTYPES", {torch.bfloat16})
    assert project_few_rows((layer,), x[:, :64]) is not None
    assert project_few_rows((layer,), x) is None
    monkeypatch.setattr(few_rows, "EMULATED_DTYPES", frozenset())
    assert project_few_rows((layer,), x[:, :64]) is None
