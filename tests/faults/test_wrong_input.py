"""Wrong shapes, dtypes and devices: refused by a documented type with the argument, before anything changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conversations import cache_snapshot
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens
from transformer.errors import ArgumentError, AttentionError, DeviceError, DtypeError, ShapeError

HELD, WIDTH, KV_WIDTH = 3, 16, 6
SIZES = st.integers(0, 17)
SHAPES = st.lists(SIZES, max_size=5).map(tuple)


class Pair:
    """A module in mid-conversation that is called wrongly, and one that is not."""

    def __init__(self, source: bool = False, **options: object) -> None:
        self.kv = tokens(2, 5, KV_WIDTH, seed=8) if source else None
        self.module, self.clean = (
            build(Options(num_groups=2, causal=not source, **options), kv_dim=KV_WIDTH if source else None)
            for _ in range(2)
        )
        with torch.no_grad():
            for module in (self.module, self.clean):
                self.call(module, tokens(2, HELD, WIDTH))

    def call(self, module: nn.Module, x: Tensor, **arguments: object) -> object:
        if self.kv is not None:
            arguments = {"kv": self.kv, **arguments}
        return module(x, **arguments)

    def refuses(self, error: type[AttentionError], name: str, x: Tensor | None = None, **arguments: object) -> None:
        """The call is refused, twice, with its argument named and nothing changed, whether gradients are recorded or
        not; then a right one gives bit for bit what the other module gives."""
        before = cache_snapshot(self.module)
        x = tokens(2, 2, WIDTH, seed=9) if x is None else x
        for recorded in (False, True):
            with torch.set_grad_enabled(recorded), pytest.raises(error) as refusal:
                self.call(self.module, x, **arguments)
            assert type(refusal.value) is error
            message = str(refusal.value)
            assert message.startswith(f"{name}: "), message
            assert "expected" in message, message
            assert "got" in message or error is ArgumentError, message
            assert cache_snapshot(self.module) == before
        with torch.no_grad():
            x = tokens(2, 2, WIDTH, seed=10)
            assert torch.equal(self.call(self.module, x), self.call(self.clean, x))
        assert cache_snapshot(self.module) == cache_snapshot(self.clean)


@settings(max_examples=40)
@given(SHAPES, st.booleans())
def test_x_of_any_wrong_shape(shape: tuple[int, ...], source: bool) -> None:
    fits = len(shape) == 3 and shape[2] == WIDTH
    assume(not (fits and shape[0] == 2))
    # Another batch may meet a source of as many rows, but here the source has two; without one the cache has two.
    Pair(source).refuses(ShapeError, "kv" if fits and source else "x", torch.zeros(shape, dtype=torch.float64))


@settings(max_examples=30)
@given(st.lists(SIZES, max_size=4).map(tuple), st.booleans())
def test_a_mask_of_any_wrong_shape(shape: tuple[int, ...], source: bool) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    if shape != (2, 2):
        Pair(source).refuses(ShapeError, "attention_mask", attention_mask=mask)
    if source and shape != (2, 5):
        Pair(source).refuses(ShapeError, "kv_mask", kv_mask=mask)


@settings(max_examples=40)
@given(SHAPES)
def test_a_source_of_any_wrong_shape(shape: tuple[int, ...]) -> None:
    assume(not (len(shape) == 3 and shape[0] == 2 and shape[2] == KV_WIDTH))
    Pair(source=True).refuses(ShapeError, "kv", kv=torch.zeros(shape, dtype=torch.float64))


@settings(max_examples=60)
@given(st.lists(st.sampled_from((0, 1, 2, 3, 4, 5, 8)), max_size=5).map(tuple), st.booleans())
def test_a_bias_that_does_not_broadcast(shape: tuple[int, ...], source: bool) -> None:
    target = (2, 4, 2, 5 if source else HELD + 2)
    fits = len(shape) <= 4 and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))
    assume(not fits)
    Pair(source).refuses(ShapeError, "attn_bias", attn_bias=torch.zeros(shape))


WRONG_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


@pytest.mark.parametrize("dtype", WRONG_DTYPES, ids=str)
@pytest.mark.parametrize("source", [False, True], ids=["self", "cross"])
def test_tokens_of_another_dtype(source: bool, dtype: torch.dtype) -> None:
    pair = Pair(source, scheme=SCHEMES["rotary halves"])
    pair.refuses(DtypeError, "x", torch.zeros(2, 2, WIDTH, dtype=dtype))
    if source:
        pair.refuses(DtypeError, "kv", kv=torch.zeros(2, 5, KV_WIDTH, dtype=dtype))


@pytest.mark.parametrize("source", [False, True], ids=["self", "cross"])
def test_masks_and_biases_of_another_kind(source: bool) -> None:
    pair = Pair(source)
    columns = 5 if source else HELD + 2
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64):
        pair.refuses(DtypeError, "attention_mask", attention_mask=torch.ones(2, 2, dtype=dtype))
        if source:
            pair.refuses(DtypeError, "kv_mask", kv_mask=torch.ones(2, 5, dtype=dtype))
    for dtype in (torch.int64, torch.uint8, torch.complex64):
        pair = Pair(source)
        pair.refuses(DtypeError, "attn_bias", attn_bias=torch.zeros(2, columns, dtype=dtype))


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"window_size": 2, "num_sinks": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "bias_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool], ids=str
)
def test_a_bias_of_any_float_dtype_is_welcome(bias_dtype: torch.dtype, dtype: torch.dtype, more: dict) -> None:
    """Whichever way the kernel goes: the output keeps the dtype of `x`, and the numbers those of the bias."""
    module, same = (build(Options(**more), dtype=dtype) for _ in range(2))
    bias = (tokens(4, 4, seed=4) > 0).to(bias_dtype)
    for recorded in (False, True):
        for weights in (False, True):
            x = tokens(2, 4, WIDTH, dtype=dtype)
            with torch.set_grad_enabled(recorded):
                module.kv_cache = same.kv_cache = None
                out = module(x, attn_bias=bias, return_weights=weights)
                expected = same(
                    x, attn_bias=bias if bias.dtype == torch.bool else bias.to(dtype), return_weights=weights
                )
            pairs = zip(out, expected, strict=True) if weights else ((out, expected),)
            for actual, wanted in pairs:
                assert actual.dtype == dtype
                torch.testing.assert_close(actual, wanted, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=0)


@pytest.mark.parametrize("source", [False, True], ids=["self", "cross"])
def test_tensors_on_another_device(source: bool) -> None:
    pair = Pair(source)
    elsewhere = {"device": "meta"}
    columns = 5 if source else HELD + 2
    pair.refuses(DeviceError, "x", torch.zeros(2, 2, WIDTH, dtype=torch.float64, **elsewhere))
    pair.refuses(DeviceError, "attention_mask", attention_mask=torch.ones(2, 2, dtype=torch.bool, **elsewhere))
    pair = Pair(source)
    pair.refuses(DeviceError, "attn_bias", attn_bias=torch.zeros(2, columns, **elsewhere))
    if source:
        pair.refuses(DeviceError, "kv", kv=torch.zeros(2, 5, KV_WIDTH, dtype=torch.float64, **elsewhere))
        pair.refuses(DeviceError, "kv_mask", kv_mask=torch.ones(2, 5, dtype=torch.bool, **elsewhere))


def test_arguments_that_do_not_go_together() -> None:
    pair, kv = Pair(), tokens(2, 5, WIDTH)
    pair.refuses(ArgumentError, "kv", kv=kv)  # the module is causal
    pair.refuses(ArgumentError, "kv_mask", kv_mask=torch.ones(2, 2, dtype=torch.bool))
    Pair(source=True).refuses(ArgumentError, "kv", kv=None)  # sources here are of another width than x


@settings(max_examples=20)
@given(SHAPES)
def test_a_plan_for_any_wrong_shape(shape: tuple[int, ...]) -> None:
    """A stack calls `plan` before a layer has checked `x`."""
    assume(not (len(shape) == 3 and shape[2] == WIDTH and shape[0] == 2))
    pair = Pair()
    before = cache_snapshot(pair.module)
    with pytest.raises(ShapeError, match=r"^x: expected"):
        pair.module.plan(torch.zeros(shape, dtype=torch.float64))
    assert cache_snapshot(pair.module) == before


def test_a_step_of_another_window_is_refused() -> None:
    """Two layers that fixed their windows apart, by what each held: one's step would shrink the other's window."""
    module, other = build(Options()), build(Options())
    with torch.no_grad():
        module(tokens(1, 3, WIDTH), None, False)
        other(tokens(1, 2, WIDTH), None, False)
        other(tokens(1, 1, WIDTH), None, False)
        x = tokens(1, 1, WIDTH)
        before = cache_snapshot(module)
        with pytest.raises(ArgumentError, match=r"^step: "):
            module(x, step=other.plan(x, False))
    assert cache_snapshot(module) == before


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_a_batch_of_no_rows(cached: bool, masked: bool) -> None:
    """Nothing to do: an output of no rows, for every module."""
    x, mask = tokens(0, 3, WIDTH), padding([], 3) if masked else None
    with torch.no_grad():
        assert build(Options(cached=cached))(x, attention_mask=mask).shape == (0, 3, WIDTH)
        module = build(Options(cached=cached, causal=False))
        assert module(x, tokens(0, 4, WIDTH), attention_mask=mask).shape == (0, 3, WIDTH)
