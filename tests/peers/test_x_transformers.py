"""Weights of x-transformers' `Attention` in our modules: the same outputs, cached and uncached."""

import pytest
import torch
from x_transformers.x_transformers import AlibiPositionalBias, Attention
from x_transformers.x_transformers import RotaryEmbedding as TheirRotary

from transformer import GroupQueryAttention
from transformer.positions import ALiBi, RotaryEmbedding

EMBED_DIM, NUM_HEADS, HEAD_DIM, LENGTH = 32, 4, 8, 10


def pair(num_groups: int, **options: object) -> tuple[GroupQueryAttention, Attention]:
    theirs = Attention(
        dim=EMBED_DIM, heads=NUM_HEADS, kv_heads=num_groups, dim_head=HEAD_DIM, causal=True, flash=True
    ).eval()
    ours = GroupQueryAttention(EMBED_DIM, NUM_HEADS, num_groups, True, bias=False, **options).eval()
    # Their query head h reads key/value head h % G, ours h // (H / G): the same heads in another order.
    order = torch.arange(NUM_HEADS).view(-1, num_groups).T.flatten()
    rows = (order[:, None] * HEAD_DIM + torch.arange(HEAD_DIM)).flatten()
    with torch.no_grad():
        ours.q_proj.weight.copy_(theirs.to_q.weight[rows])
        ours.k_proj.weight.copy_(theirs.to_k.weight)
        ours.v_proj.weight.copy_(theirs.to_v.weight)
        ours.out_proj.weight.copy_(theirs.to_out.weight[:, rows])
    return ours, theirs


def in_steps(ours: GroupQueryAttention, x: torch.Tensor) -> torch.Tensor:
    ours.use_kv_cache = True
    return torch.cat([ours(chunk) for chunk in x.split([3, 1, 1, 5], dim=1)], dim=1)


@pytest.mark.parametrize("num_groups", [4, 2, 1])
@torch.no_grad()
def test_without_positions(num_groups: int) -> None:
    ours, theirs = pair(num_groups)
    x = torch.randn(2, LENGTH, EMBED_DIM)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(in_steps(ours, x), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_interleaved_rotary() -> None:
    ours, theirs = pair(2, position=RotaryEmbedding(HEAD_DIM, interleaved=True))
    x = torch.randn(2, LENGTH, EMBED_DIM)
    expected = theirs(x, rotary_pos_emb=TheirRotary(HEAD_DIM)(torch.arange(LENGTH)))
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(in_steps(ours, x), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_alibi() -> None:
    ours, theirs = pair(4, position=ALiBi(NUM_HEADS))
    x = torch.randn(2, LENGTH, EMBED_DIM)
    expected = theirs(x, rel_pos=AlibiPositionalBias(heads=NUM_HEADS, total_heads=NUM_HEADS))
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(in_steps(ours, x), expected, rtol=0, atol=1e-5)
