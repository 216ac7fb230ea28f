"""Weights of `torch.nn.MultiheadAttention` in our module: the same outputs, cached and uncached."""

import pytest
import torch
from torch import nn

from transformer import MultiHeadAttention

EMBED_DIM, NUM_HEADS, LENGTH = 32, 4, 9


def pair(kv_dim: int | None = None, causal: bool = False) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    theirs = nn.MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True, kdim=kv_dim, vdim=kv_dim).double().eval()
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = MultiHeadAttention(EMBED_DIM, NUM_HEADS, causal, kv_dim=kv_dim).double().eval()
    weights = theirs.in_proj_weight.chunk(3) if kv_dim is None else (
        theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight
    )  # fmt: skip
    with torch.no_grad():
        for projection, weight, bias in zip(
            (ours.q_proj, ours.k_proj, ours.v_proj), weights, theirs.in_proj_bias.chunk(3), strict=True
        ):
            projection.weight.copy_(weight)
            projection.bias.copy_(bias)
        ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
    return ours, theirs


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_and_weights(causal: bool) -> None:
    ours, theirs = pair(causal=causal)
    x = torch.randn(2, LENGTH, EMBED_DIM, dtype=torch.float64)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else None
    expected, weights = theirs(x, x, x, attn_mask=mask, average_attn_weights=False)
    out, own_weights = ours(x, return_weights=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(own_weights, weights, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lengths", [[1] * LENGTH, [4, 5], [LENGTH]])
def test_cached_chunks(lengths: list[int]) -> None:
    ours, theirs = pair(causal=True)
    x = torch.randn(2, LENGTH, EMBED_DIM, dtype=torch.float64)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    ours.use_kv_cache = True
    with torch.no_grad():
        out = torch.cat([ours(chunk) for chunk in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_padded_source_of_another_width() -> None:
    ours, theirs = pair(kv_dim=20)
    x = torch.randn(2, 5, EMBED_DIM, dtype=torch.float64)
    source = torch.randn(2, LENGTH, 20, dtype=torch.float64)
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, 4:] = False
    expected = theirs(x, source, source, key_padding_mask=~real, need_weights=False)[0]
    torch.testing.assert_close(ours(x, kv=source, kv_mask=real), expected, rtol=0, atol=1e-10)
    ours.use_kv_cache = True
    with torch.no_grad():
        for step in range(5):
            out = ours(x[:, step : step + 1], kv=source, kv_mask=real)
            torch.testing.assert_close(out, expected[:, step : step + 1], rtol=0, atol=1e-10)


def test_gradients() -> None:
    ours, theirs = pair(causal=True)
    x = torch.randn(2, LENGTH, EMBED_DIM, dtype=torch.float64)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    theirs(x, x, x, attn_mask=mask, need_weights=False)[0].square().sum().backward()
    ours(x).square().sum().backward()
    q, k, v = theirs.in_proj_weight.grad.chunk(3)
    for projection, expected in ((ours.q_proj, q), (ours.k_proj, k), (ours.v_proj, v)):
        torch.testing.assert_close(projection.weight.grad, expected, rtol=0, atol=1e-9)
