"""Biases from the caller: only -inf hides a key, finite numbers stay finite, other values are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import Options
from tests.setups import SCHEMES, build, tokens
from transformer.errors import ArgumentError, ShapeError
from transformer.kernels.biases import given_bias

LENGTH, WIDTH = 5, 16
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
PLAIN = Options(embed_dim=WIDTH, num_heads=4, num_groups=2, cached=False)
MODULES = {
    "plain": PLAIN,
    "MQA": replace(PLAIN, num_groups=1),
    "not causal": replace(PLAIN, causal=False),
    "softcap": replace(PLAIN, softcap=5.0),
    "alibi": replace(PLAIN, scheme=SCHEMES["alibi"]),
    "t5": replace(PLAIN, scheme=SCHEMES["t5 causal"]),
    "window": replace(PLAIN, window_size=2, num_sinks=1),
    "window with alibi": replace(PLAIN, window_size=2, num_sinks=1, scheme=SCHEMES["alibi"]),
}


def plain(module: nn.Module, x: Tensor, bias: Tensor, **options: object) -> Tensor:
    return module(x, attn_bias=bias, **options)


def weighed(module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    return module(x, attn_bias=bias, return_weights=True)[0]


def recorded(module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    with torch.enable_grad():
        out = module(x, attn_bias=bias.clone().requires_grad_())
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), list(module.parameters())))
    return out.detach()


def in_steps(module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    module.use_kv_cache, module.kv_cache = True, None
    cuts = ((0, 2), (2, 3), (3, 5))
    out = [module(x[:, a:b], attn_bias=bias[..., a:b, :b]) for a, b in cuts]
    module.use_kv_cache = False
    return torch.cat(out, 1)


def ragged(module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    """With a shorter row that has padding on the left."""
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, :2] = False
    return module(x.expand(2, -1, -1), attention_mask=mask, attn_bias=bias)[:1]


def traced(module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    return torch.func.vmap(lambda x: module(x, attn_bias=bias))(x[None])[0]


def autocast(module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return module(x, attn_bias=bias)
    with torch.autocast("cpu", dtype=x.dtype):
        return module.float()(x.float(), attn_bias=bias)


WAYS = [plain, weighed, recorded, in_steps, ragged, traced, autocast]


def expected(name: str, module: nn.Module, x: Tensor, low: Tensor, value: float) -> Tensor:
    """In float64: a low number beside others hides its key. Where a query has no other, its keys weigh alike if the
    number swallows the scores that it is added to (in float32, or float64), else as if nothing had been added."""
    dtype, numbers = x.dtype, module.state_dict()
    module, x = build(MODULES[name]).eval(), x.double()
    module.load_state_dict(numbers)
    rows = low.all(-1, keepdim=True)
    _, weights = module(x, attn_bias=~low | rows, return_weights=True)
    added = torch.float64 if dtype is torch.float64 else torch.float32
    if abs(value) * torch.finfo(added).eps > 100:
        alike = (weights > 0).double()
        weights = torch.where(rows, alike / alike.sum(-1, keepdim=True), weights)
    values = module.key_value(x)[1].repeat_interleave(4 // module.num_groups, 1)
    return module.out(weights @ values)


LOWS = ["float32", "of the dtype", "-1e9"]


def number(low: str, dtype: torch.dtype) -> float:
    return {"float32": torch.finfo(torch.float32).min, "of the dtype": torch.finfo(dtype).min, "-1e9": -1e9}[low]


CASES = [(name, way) for name in MODULES for way in WAYS if (name, way) != ("not causal", in_steps)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "way"), CASES)
@torch.no_grad()
def test_low_numbers_mean_the_same(name: str, way: Callable, dtype: torch.dtype) -> None:
    module, x = build(MODULES[name], dtype=dtype).eval(), 2 * tokens(1, LENGTH, WIDTH, dtype=dtype)
    for low in LOWS:
        means_the_same(name, module, x, way, number(low, dtype))


def means_the_same(name: str, module: nn.Module, x: Tensor, way: Callable, value: float) -> None:
    dtype = x.dtype
    lows = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    lows[1] = lows[3] = True
    lows[2, 0] = lows[4, 1:3] = True
    wanted = expected(name, module, x, lows, value)
    for given in (torch.float32, torch.float64, dtype):
        if value < torch.finfo(given).min:
            continue
        bias = torch.zeros(1, 1, LENGTH, LENGTH, dtype=given).masked_fill(lows, value)
        out = way(module, x, bias)
        error = (out.double() - wanted).abs().max().item()
        assert error <= TOLERANCE[dtype], (value, given, error)
        module.to(dtype)


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_low_numbers_for_a_source(dtype: torch.dtype, low: str) -> None:
    module = build(replace(PLAIN, causal=False), dtype=dtype).eval()
    x, kv = (2 * tokens(2, length, WIDTH, seed=length, dtype=dtype) for length in (3, 4))
    bias = torch.zeros(3, 4, dtype=torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)
    bias[0, 1], bias[1] = number(low, dtype), number(low, dtype)
    outs = [
        module(x, kv, attn_bias=bias),
        module(x, kv, attn_bias=bias, return_weights=True)[0],
        torch.func.vmap(lambda x: module(x, kv, attn_bias=bias))(x[None])[0],
    ]
    assert all(out.isfinite().all() for out in outs)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=TOLERANCE[dtype])
    hidden = torch.zeros(3, 4).masked_fill(bias < 0, -math.inf)
    torch.testing.assert_close(outs[0][:, 0], module(x, kv, attn_bias=hidden)[:, 0], rtol=0, atol=TOLERANCE[dtype])
    assert not torch.allclose(outs[0][:, 1], module.out_proj.bias.expand(2, -1), atol=0.1), "its keys are seen"


@pytest.mark.parametrize("query", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
def test_what_is_added_stays_finite(device: str, query: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the dtype that SDPA takes on other devices, with what a position scheme adds."""
    queries = torch.zeros(1, 1, 2, 4, dtype=query)
    if device != "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))
    given = torch.tensor([-1.7e308, -3.4e38, -65504.0, 0.0, 1.7e308, -math.inf], dtype=torch.float64)
    bias = (given_bias(given, queries) - 1000.0).to(query if device != "cpu" else torch.float32)
    assert bias.isfinite().tolist() == [True] * 5 + [False]
    assert bias[-1] == -math.inf
    assert given_bias(torch.tensor(-65504.0, dtype=torch.float16), queries).dtype is torch.float32


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 3), (2, 4, 3, 3)], ids=str)
def test_inf_and_nan_are_refused(shape: tuple[int, ...], dtype: torch.dtype, wrong: float) -> None:
    module, x = build(replace(PLAIN, causal=False, cached=True)), tokens(2, 3, WIDTH)
    bias = torch.full(shape, -math.inf, dtype=dtype)
    bias.view(-1)[-1] = wrong
    calls = [
        lambda: module(x, attn_bias=bias),
        lambda: module(x, x, attn_bias=bias, return_weights=True),
        lambda: module(x, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]), attn_bias=bias.requires_grad_()),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=f"attn_bias: .* got {wrong}"):
            call()
        assert module.kv_cache is None


def test_a_traced_call_does_not_look_at_the_numbers() -> None:
    module, x = build(PLAIN), tokens(1, 3, WIDTH)
    bias = torch.full((3, 3), math.nan)
    assert torch.func.vmap(lambda x: module(x, attn_bias=bias))(x[None]).isnan().all()
    meta = module.to("meta")
    assert meta(x.to("meta"), attn_bias=bias.to("meta")).shape == x.shape


# --- a number alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", [plain, weighed, ragged, traced])
@pytest.mark.parametrize("name", ["plain", "not causal", "softcap", "window with alibi"])
@torch.no_grad()
def test_a_number_alone(name: str, way: Callable, dtype: torch.dtype) -> None:
    """Added to every score it changes nothing."""
    module, x = build(MODULES[name], dtype=dtype).eval(), tokens(1, LENGTH, WIDTH, dtype=dtype)
    wanted = module(x)
    for number in (torch.tensor(True), torch.tensor(2.5), torch.tensor(-200.0).half()):
        torch.testing.assert_close(way(module, x, number), wanted, rtol=0, atol=TOLERANCE[dtype])


@torch.no_grad()
def test_a_number_alone_over_a_cache_and_a_source() -> None:
    x = tokens(2, 4, WIDTH)
    for number in (torch.tensor(True), torch.tensor(1.5)):
        module = build(replace(PLAIN, cached=True))
        whole = build(PLAIN)(x)
        outs = [module(part, attn_bias=number) for part in x.split((2, 1, 1), 1)]
        torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=1e-9)
        module = build(replace(PLAIN, causal=False, cached=True))
        torch.testing.assert_close(module(x, x, attn_bias=number), module(x, x), rtol=0, atol=1e-9)
    hidden = torch.tensor(-math.inf)
    assert torch.equal(module(x, x, attn_bias=hidden), module.out_proj.bias.expand_as(x))


@pytest.mark.parametrize("shape", [(0,), (2,), (3, 1, 1, 4, 4), (4, 0)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="attn_bias"):
        build(PLAIN)(tokens(2, 4, WIDTH), attn_bias=torch.zeros(shape))
