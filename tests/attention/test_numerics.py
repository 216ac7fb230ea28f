"""16-bit outputs: never more than twice as far from float64 as PyTorch's own kernel in that dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.oracle import Conversation, Options
from tests.setups import build, tokens
from transformer.attention.kernels import Kernel

OPTIONS = Options(embed_dim=64, num_heads=8, num_groups=8, head_dim=8)


def bare(module: nn.Module) -> None:
    """Projections that only move numbers, so that the module's output is the kernel's output, head by head.

    Query features are those of `x`, key features `x` reversed, values `x` shifted: all exact in any dtype.
    """
    eye = torch.eye(64, dtype=torch.float64)
    width = module.k_proj.weight.shape[0]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.q_proj.weight.copy_(eye)
        module.k_proj.weight.copy_(eye.flip(0)[:width])
        module.v_proj.weight.copy_(eye.roll(3, 0)[:width])
        module.out_proj.weight.copy_(eye)


def heads(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values of `bare`, `[B, H, L, 8]`, keys and values repeated for their query
    heads."""
    split = [part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in (x, x.flip(-1), x.roll(3, -1))]
    repeat = 8 // groups
    return split[0], *(part[:, :groups].repeat_interleave(repeat, 1) for part in split[1:])


def visible(length: int, window: int | None) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < (window or length))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("chunks", [(96,), (32, 64), (64, *[1] * 32)], ids=["one", "two", "steps"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_sixteen_bit_error(
    chunks: tuple[int, ...], groups: int, window: int | None, dtype: torch.dtype, grad: bool
) -> None:
    """museum: transformers#25420, litgpt#2165 (cached and uncached 16-bit runs differ): here is by how
    much."""
    module = build(replace(OPTIONS, num_groups=groups, window_size=window), dtype=dtype)
    bare(module)
    x = 2 * tokens(2, sum(chunks), 64, dtype=dtype)
    queries, keys, values = heads(x, groups)
    mask = visible(x.shape[1], window)
    exact = scaled_dot_product_attention(*(t.double() for t in (queries, keys, values)), attn_mask=mask)
    theirs = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    with torch.set_grad_enabled(grad):
        ours = torch.cat([module(part) for part in x.split(chunks, dim=1)], dim=1)
    exact, theirs = (t.transpose(1, 2).flatten(2) for t in (exact, theirs))
    bound = 2 * (theirs.double() - exact).abs().max().item() + 1e-5
    error = (ours.double() - exact).abs().max().item()
    assert error <= bound, (error, bound)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("keys", [5, 1000, 9000])
@pytest.mark.parametrize("groups", [8, 2, 1])
@torch.no_grad()
def test_one_token_in_bfloat16(groups: int, keys: int, biased: bool) -> None:
    """Keys are read as they are stored, yet scores are not rounded to the 8 bits of a product's output."""
    query, key, value = (
        tokens(2 * heads, length, 64, seed=seed, dtype=torch.bfloat16).unflatten(0, (2, heads))
        for seed, (heads, length) in enumerate(((8, 1), (groups, keys), (groups, keys)))
    )
    query = 2 * query
    bias = tokens(1, 1, keys, seed=5, dtype=torch.bfloat16)[None] if biased else None
    repeated = [part.repeat_interleave(8 // groups, 1) for part in (key, value)]
    exact = scaled_dot_product_attention(
        query.double(), *(part.double() for part in repeated), None if bias is None else bias.double()
    )
    theirs = scaled_dot_product_attention(query, *repeated, bias)
    ours, _ = Kernel(64**-0.5)(query, key, value, bias)
    assert ours.dtype == torch.bfloat16
    bound = 2 * (theirs.double() - exact).abs().max().item() + 1e-5
    error = (ours.double() - exact).abs().max().item()
    assert error <= bound, (error, bound)


def test_the_reference_of_this_file_is_the_oracle() -> None:
    """`heads`, `bare` and the mask above say the same as the oracle does."""
    options = replace(OPTIONS, num_groups=2, window_size=3)
    module = build(options)
    bare(module)
    x = tokens(1, 6, 64)
    expected, _ = Conversation(module, options).call(x)
    out = scaled_dot_product_attention(*heads(x, 2), attn_mask=visible(6, 3))
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), expected, atol=1e-12, rtol=0)
