"""The reference against plain loops over numbers, one query and one key at a time."""

import math

import pytest
import torch
from torch import Tensor

from transformer.kernels import Sinks
from transformer.kernels.inputs import AttentionInputs
from transformer.kernels.reference import reference_attention


def by_loops(inputs: AttentionInputs, scale: float, softcap: float | None, causal: bool) -> tuple[Tensor, Tensor]:
    query, key, value, bias, sinks = inputs[:5]
    batch, heads, length, _ = query.shape
    keys, number = key.shape[2], 0 if sinks is None else sinks.key.shape[2]
    out, weights = torch.zeros_like(query), query.new_zeros(batch, heads, length, number + keys)

    def score(q: Tensor, k: Tensor, added: Tensor | None, place: tuple[int, int, int, int]) -> float:
        raw = scale * sum(a * b for a, b in zip(q.tolist(), k.tolist(), strict=True))
        raw = raw if softcap is None else softcap * math.tanh(raw / softcap)
        return raw if added is None else raw + added[place].item()

    for b in range(batch):
        for h in range(heads):
            g = h * key.shape[1] // heads
            for i in range(length):
                values = [*([] if sinks is None else sinks.value[b, g].tolist()), *value[b, g].tolist()]
                scores = (
                    []
                    if sinks is None
                    else [
                        score(sinks.query[b, h, i], sinks.key[b, g, j], sinks.bias, (b, h, i, j)) for j in range(number)
                    ]
                )
                scores += [score(query[b, h, i], key[b, g, j], bias, (b, h, i, j)) for j in range(keys)]
                shown = number + (keys - length + i + 1 if causal else keys)
                powers = [math.exp(s) if place < shown else 0.0 for place, s in enumerate(scores)]
                weights[b, h, i] = torch.tensor(powers, dtype=torch.float64) / sum(powers)
                for place, vector in enumerate(values):
                    out[b, h, i] += weights[b, h, i, place] * torch.tensor(vector, dtype=torch.float64)
    return out, weights


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_plain_loops(groups: int, causal: bool, softcap: float | None, with_sinks: bool, biased: bool) -> None:
    query, other = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64)
    key, value = torch.randn(2, 2, groups, 6, 5, dtype=torch.float64)
    bias = sink_bias = None
    if biased:
        bias, sink_bias = torch.randn(2, 4, 3, 6, dtype=torch.float64), torch.randn(2, 4, 3, 2, dtype=torch.float64)
        bias[:, 1:, :, 2] = sink_bias[:, :2, :, 1] = -math.inf
    sinks = Sinks(other, key[:, :, 3:5], value[:, :, 3:5], sink_bias) if with_sinks else None
    inputs = AttentionInputs(query, key, value, bias, sinks)
    for found, expected in zip(
        reference_attention(inputs, 0.7, softcap, causal=causal), by_loops(inputs, 0.7, softcap, causal), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_computes_in_at_least_float32(dtype: torch.dtype) -> None:
    """Only the results are rounded to 16 bits."""
    inputs = AttentionInputs(*torch.randn(3, 1, 2, 9, 8).to(dtype))
    found, exact = (
        reference_attention(each, 0.3) for each in (inputs, AttentionInputs(*(x.double() for x in inputs[:3])))
    )
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_dropout_leaves_the_weights_and_scales_the_output() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 50, 8), torch.randn(1, 1, 40, 8)
    value = torch.ones(1, 1, 40, 8)
    out, weights = reference_attention(AttentionInputs(query, key, value), 0.3, dropout=0.5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 50))
    assert out.std() > 0.05
    assert abs(out.mean().item() - 1.0) < 0.1
