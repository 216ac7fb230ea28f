"""Errors of 16-bit outputs against float64: at most twice those of PyTorch's own kernel in that dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.oracle import Conversation, Options
from tests.setups import build, tokens
from transformer.kernels import Kernel, private_operators, split_kv, tuned

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
    """Issues: transformers#25420, litgpt#2165. Cached and uncached 16-bit runs differ: here is by how much."""
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


@pytest.mark.slow
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


CAPABLE = frozenset((torch.float16, torch.bfloat16))


# Each threshold of tuning.py from both sides: one token, a few, more than products take, two blocks.
SIZES = [
    *((1, groups, heads, 1, 4096) for groups, heads in ((1, 1), (1, 2), (1, 8), (3, 3))),
    *((1, 1, 8, 1, keys) for keys in (4095, 4099)),
    *((1, 1, 8, 1, keys) for keys in (16_383, 16_384)),
    (2, 3, 6, 1, 400),
    *((1, 3, 3, 1, keys) for keys in (341, 342)),
    *((1, 3, 3, 2, held + 2) for held in (1023, 1024, 4094)),
    (2, 1, 5, 13, 1037),
    (1, 2, 8, 16, 1040),
    (1, 2, 8, 17, 1041),
    (1, 4, 8, 64, 2048),
    (1, 1, 1, 1024, 2050),
    (1, 1, 1, 1030, 2060),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capable", [CAPABLE, frozenset()], ids=["16-bit products", "none"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@torch.no_grad()
def test_error_at_every_threshold(
    sizes: tuple[int, ...], capable: frozenset[torch.dtype], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many draws, since maxima vary: merging parts that had been rounded kept to the bound in most of them."""
    monkeypatch.setattr(private_operators, "FUSED_HALF_DTYPES", capable)
    batch, groups, heads, new, keys = sizes
    dim = 128 if groups == 3 else 64
    mask = None if new == 1 else torch.ones(new, keys, dtype=torch.bool).tril(keys - new)
    torch.manual_seed(0)
    for draw in range(min(16, 1 + 36_000 // (new * keys))):
        query, key, value = (
            torch.randn(batch, number, length, dim).to(dtype)
            for number, length in ((heads, new), (groups, keys), (groups, keys))
        )
        wide = [query.double(), *(x.double().repeat_interleave(heads // groups, 1) for x in (key, value))]
        exact = scaled_dot_product_attention(*wide, mask)
        theirs = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        ours, _ = Kernel(dim**-0.5)(query, key, value, causal=new > 1)
        bound = 2 * (theirs.double() - exact).abs().max().item() + 1e-5
        error = (ours.double() - exact).abs().max().item()
        assert error <= bound, (draw, error, bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_chunk_is_its_masked_softmax(dtype: torch.dtype) -> None:
    """Causal order as one row of numbers, also in blocks of which the last is shorter, and in a buffer with room."""
    query = tokens(2, 6, 70, 16, dtype=dtype)
    key, value = (tokens(2, 3, 2000, 16, seed=seed, dtype=dtype)[:, :, : 1024 + 70] for seed in (1, 2))
    order = torch.zeros(70, 1094).masked_fill(torch.ones(70, 1094).tril(1024) == 0, -torch.inf)
    expected = scaled_dot_product_attention(query, key, value, order[None, None], scale=0.25, enable_gqa=True)
    with tuned(half_causal_rows=32):
        ours = split_kv.prefix_and_causal(query, key, value, 0.25)
    torch.testing.assert_close(ours, expected, rtol=0, atol=torch.finfo(dtype).eps)


def test_the_reference_of_this_file_is_the_oracle() -> None:
    """`heads`, `bare` and the mask above say the same as the oracle does."""
    options = replace(OPTIONS, num_groups=2, window_size=3)
    module = build(options)
    bare(module)
    x = tokens(1, 6, 64)
    expected, _ = Conversation(module, options).call(x)
    out = scaled_dot_product_attention(*heads(x, 2), attn_mask=visible(6, 3))
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), expected, atol=1e-12, rtol=0)
