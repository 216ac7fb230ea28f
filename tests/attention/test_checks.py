"""Invalid numbers in the options of a module, which its constructor refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from transformer import DecoderOnlyTransformer, GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.errors import ConfigurationError

DOORS: dict[str, Callable[..., object]] = {
    "MHA": lambda **number: MultiHeadAttention(8, 2, **number),
    "MQA": lambda **number: MultiQueryAttention(8, 2, **number),
    "GQA": lambda **number: GroupQueryAttention(8, 2, 1, **number),
    "model": lambda **number: DecoderOnlyTransformer(16, 8, 2, 8, 1, **number),
}
WRONG = [0.0, -0.0, 0, -0.3, -1, 1e-320, 2.0**-150, 1e39, 10**400, math.inf, -math.inf, math.nan, "1", True, [1.0], 1j]


@pytest.mark.parametrize("number", WRONG, ids=str)
@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("door", DOORS)
def test_factors_that_are_refused(door: str, name: str, number: object) -> None:
    """Below 0, 0 itself in float32, or more than it holds: hidden scores times such a factor are NaN."""
    with pytest.raises(ConfigurationError, match=f"^{name}: expected"):
        DOORS[door](**{name: number})


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1, 0.125, np.float32(0.5), 1e38])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_scales_that_are_taken(causal: bool, scale: float) -> None:
    module, x = MultiHeadAttention(8, 2, causal, scale=scale).eval(), torch.randn(1, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    out, (same, _) = module(x), module(x, return_weights=True)
    torch.testing.assert_close(out, same, rtol=0, atol=1e-5)
    assert out.isfinite().all()
    assert module(x, attention_mask=mask).isfinite().all()


@pytest.mark.parametrize("number", [-0.1, 1.0, math.nan, None, "0", True], ids=str)
def test_dropout_that_is_refused(number: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^dropout: expected"):
        MultiHeadAttention(8, 2, dropout=number)


def test_a_norm_of_all_heads_that_does_not_fit_both() -> None:
    with pytest.raises(ConfigurationError, match=r"^qk_norm: expected a callable.* queries have 8 and keys 4"):
        GroupQueryAttention(8, 2, 1, qk_norm=nn.RMSNorm(8), qk_norm_per_head=False)
    with pytest.raises(ConfigurationError, match=r"^qk_norm_per_head: expected True or False"):
        GroupQueryAttention(8, 2, 1, qk_norm=nn.RMSNorm, qk_norm_per_head=None)
    module = MultiHeadAttention(8, 2, qk_norm=nn.RMSNorm(8), qk_norm_per_head=False)
    assert module.q_norm is not module.k_norm
