"""Linear layers with integer, packed or cast weights in the place of ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests.integration.builders import ELSEWHERE, decoder, encoder_decoder, holds_one_conversation, token_ids, vectors
from transformer import MultiHeadAttention
from transformer.errors import DeviceError, DtypeError, ShapeError


class IntegerLinear(nn.Linear):
    """A linear of int8 weights with a scale for each row, as bitsandbytes keeps them."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = plain.bias

    def whole(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole().to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """A linear of two four-bit numbers in each byte, and without a `weight` at all."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 7
        numbers = (plain.weight.detach() / scale).round().add(8).to(torch.uint8)
        self.register_buffer("packed", numbers[:, ::2] * 16 + numbers[:, 1::2])
        self.register_buffer("scale", scale)

    def whole(self) -> Tensor:
        pairs = torch.stack((self.packed // 16, self.packed % 16), -1)
        return (pairs.flatten(1).float() - 8) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole(), self.bias)


class CastingLinear(nn.Linear):
    """A linear of bfloat16 weights that takes and gives float32."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.weight, self.bias = nn.Parameter(plain.weight.detach().bfloat16()), plain.bias

    def whole(self) -> Tensor:
        return self.weight.float()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole(), self.bias)


class CastByHooks(nn.Linear):
    """A plain linear that lies in eight bits, and is made wide by hooks for the time of its own forward."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.weight, self.bias = nn.Parameter(plain.weight.detach().to(torch.float8_e4m3fn)), plain.bias
        self.register_forward_pre_hook(lambda module, given: module.hold(torch.float32))
        self.register_forward_hook(lambda module, given, out: module.hold(torch.float8_e4m3fn))

    def hold(self, dtype: torch.dtype) -> None:
        self.weight.data = self.weight.data.to(dtype)

    def whole(self) -> Tensor:
        return self.weight.float()


def with_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Every linear but the head, whose weight is the embedding's, made another."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "proj":
                setattr(module, name, make(child))
    return model.eval()


def plain_again(linear: nn.Module) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    plain.weight, plain.bias = nn.Parameter(linear.whole().detach().clone()), linear.bias
    return plain


LINEARS = [IntegerLinear, PackedLinear, CastingLinear, CastByHooks]


@pytest.mark.slow
@pytest.mark.parametrize("options", ELSEWHERE.values(), ids=ELSEWHERE.keys())
@pytest.mark.parametrize("linear", LINEARS)
def test_a_decoder_of_other_linears(linear: type, options: dict) -> None:
    """As a model of plain linear layers with the same weights."""
    model = with_linears(decoder(**options), linear)
    plain = with_linears(decoder(**options), lambda each: plain_again(linear(each)))
    ids = token_ids(2, 7)
    with torch.no_grad():
        for given in (ids, ids[:1, :1]):
            assert_close(model(given), plain(given), atol=1e-5, rtol=0)
    expected = plain.generate(ids, max_new_tokens=6)
    assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=6, use_cache=False), expected)
    holds_one_conversation(model, plain)


@pytest.mark.parametrize("linear", LINEARS)
def test_an_encoder_decoder_of_other_linears(linear: type) -> None:
    """Its source is projected by them too, and kept."""
    model = with_linears(encoder_decoder(), linear)
    plain = with_linears(encoder_decoder(), lambda each: plain_again(linear(each)))
    source = token_ids(2, 6)
    for options in ({}, {"use_cache": False}):
        expected = plain.generate(source, max_new_tokens=6, **options)
        assert torch.equal(model.generate(source, max_new_tokens=6, **options), expected)


def test_plain_weights_still_tell_what_is_wrong() -> None:
    module, x = MultiHeadAttention(32, 4), vectors(1, 3)
    with pytest.raises(DtypeError, match=r"^x: expected torch.float32, as the module's weights, got torch.float64"):
        module(x.double())
    with pytest.raises(DeviceError, match=r"^x: expected a tensor on cpu, as the module's weights, got meta"):
        module(x.to("meta"))
    with pytest.raises(DtypeError, match=r"^kv: expected"):
        module(x, x.bfloat16())


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_projection_of_another_width_is_named(name: str, cached: bool) -> None:
    """As a shard of one gives, where each process holds some of the heads."""
    attention = MultiHeadAttention(16, 4, True, cached).eval()
    setattr(attention, name, nn.Linear(16, 8))
    with pytest.raises(ShapeError, match=rf"^{name}: expected it to give 4 heads of 4, .* got \[2, 3, 8\]"):
        attention(vectors(2, 3, width=16))
    assert attention.kv_cache is None
