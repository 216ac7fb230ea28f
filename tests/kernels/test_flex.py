"""Flex attention with a bias, in a compiled graph, against SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transformer.kernels.flex import flex

BIASES = {"of keys": (9,), "of queries": (3, 9), "of heads": (4, 1, 9), "of rows": (2, 1, 1, 9), "of all": (2, 4, 3, 9)}


@pytest.mark.slow
@pytest.mark.parametrize("groups", [4, 2])
@torch.no_grad()
def test_a_bias(groups: int) -> None:
    """Of every shape that broadcasts, with hidden keys."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 3, 16)
    key, value = torch.randn(2, 2, groups, 9, 16)
    torch._dynamo.reset()

    def attend(*given: Any) -> Tensor:
        return flex(*given, 0.3)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)
    for shape in BIASES.values():
        bias = torch.randn(shape)
        bias[..., 5:7] = float("-inf")
        right = F.scaled_dot_product_attention(
            query, key, value, bias.expand(2, 4, 3, 9), scale=0.3, enable_gqa=groups != 4
        )
        torch.testing.assert_close(compiled(query, key, value, bias), right, rtol=0, atol=2e-6)
