"""Feed-forward networks: plain and gated, all activations by their formulas, dropout only in training."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.blocks.loops import ACTIVATIONS as FORMULAS
from tests.blocks.loops import each, feed_forward
from tests.setups import fill, tokens
from transformer.blocks import ACTIVATIONS, FeedForward, GatedFeedForward
from transformer.errors import ConfigurationError

KINDS = {"plain": FeedForward, "gated": GatedFeedForward}


def test_every_activation_has_a_formula_here() -> None:
    assert set(ACTIVATIONS) == set(FORMULAS)


@pytest.mark.parametrize("bias", [True, False, None])
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("kind", KINDS)
def test_by_formula(kind: str, activation: str, bias: bool | None) -> None:
    """Inputs so far from zero that each activation differs from the others on both sides."""
    given = {} if bias is None else {"bias": bias}
    module = KINDS[kind](5, 7, activation, **given)
    fill(module, 3)
    module.double()
    assert (module.down_proj.bias is not None) == (kind == "plain" if bias is None else bias)
    for shape in ((2, 6, 5), (1, 1, 5), (2, 0, 5)):
        x = 3 * tokens(*shape)
        expected = each(partial(feed_forward, module, FORMULAS[activation]), x)
        torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "activation"), [("plain", "gelu"), ("gated", "silu")])
def test_the_default_activation(kind: str, activation: str) -> None:
    named, module = KINDS[kind](4, 6, activation), KINDS[kind](4, 6)
    named.load_state_dict(module.state_dict())
    x = tokens(1, 9, 4, dtype=torch.float32)
    assert torch.equal(module(x), named(x))


@pytest.mark.parametrize("kind", KINDS)
def test_any_callable_is_an_activation(kind: str) -> None:
    module = KINDS[kind](4, 6, torch.tanh).double()
    fill(module, 3)
    x = tokens(1, 3, 4)
    expected = each(partial(feed_forward, module, math.tanh), x)
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_last_projection_in_float32(kind: str, dtype: torch.dtype, hooked: bool) -> None:
    """Sums beyond the largest float16 are right, also with hooks; autocast casts by itself."""
    module = KINDS[kind](8, 16, "relu")
    fill(module, 3)
    module.to(dtype).down_proj.float().weight.data.mul_(1e6)
    if hooked:
        module.down_proj.register_forward_hook(lambda *_: None)
    x = tokens(2, 5, 8, dtype=dtype)
    out = module(x)
    assert out.dtype == torch.float32
    assert 1e5 < out.abs().max() < math.inf
    hidden = module.up_proj(x) if kind == "gated" else module.up_proj(x).relu()
    hidden = module.gate_proj(x).relu() * hidden if kind == "gated" else hidden
    torch.testing.assert_close(out, module.down_proj(hidden.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.float()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_over_many_weights(kind: str) -> None:
    """So many weights that few rows take a way of their own: the same numbers, and hooks run."""
    module = KINDS[kind](256, 512)
    fill(module, 3)
    x, ran = tokens(1, 6, 256, dtype=torch.float32), []
    with torch.no_grad():
        expected = each(partial(feed_forward, module, FORMULAS["gelu" if kind == "plain" else "silu"]), x[:, :1])
        whole = module(x)
        torch.testing.assert_close(whole[:, :1].double(), expected, atol=1e-5, rtol=0)
        for count in (1, 2, 4, 5):
            torch.testing.assert_close(module(x[:, :count]), whole[:, :count], atol=1e-5, rtol=0)
        for projection in (module.up_proj, module.down_proj):
            projection.register_forward_hook(lambda _module, _inputs, out: ran.append(1) or 2 * out)
        module(x[:, :1])
    assert len(ran) == 2


def to_identity(module: nn.Module) -> None:
    """Weights that hand a vector of ones through: what is hidden comes out as it is."""
    with torch.no_grad():
        for projection in module.children():
            projection.weight.copy_(torch.eye(projection.weight.shape[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_the_hidden_layer_while_training(kind: str) -> None:
    module = KINDS[kind](64, 64, "relu", bias=False, dropout=0.25)
    to_identity(module)
    x = torch.ones(1, 100, 64)
    out = module.train()(x)
    assert set(out.unique().tolist()) == {0.0, out.max().item()}
    assert out.max().item() == pytest.approx(1 / 0.75)
    assert abs((out == 0).float().mean().item() - 0.25) < 0.03
    assert torch.equal(module.eval()(x), x)
    module.dropout = 0.0
    assert torch.equal(module.train()(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_is_hidden_not_output(kind: str) -> None:
    """One hidden unit behind many outputs: they are dropped together or not at all."""
    module = KINDS[kind](4, 1, "relu", bias=False, dropout=0.5)
    with torch.no_grad():
        for projection in module.children():
            projection.weight.fill_(1.0)
    out: Tensor = module.train()(torch.ones(1, 60, 4))
    together = (out[0] != 0).sum(-1).unique().tolist()
    assert together == [0, 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("embed_dim", {"embed_dim": value}) for value in (0, -1, 2.0, "4", True)),
        *(("hidden_dim", {"hidden_dim": value}) for value in (0, -1, 2.0, "4", True)),
        *(("activation", {"activation": value}) for value in ("swish", "", "GELU")),
        *(("dropout", {"dropout": value}) for value in (-0.1, 1.0, math.nan, math.inf)),
    ],
    ids=str,
)
def test_refused(kind: str, name: str, options: dict) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: expected .*, got "):
        KINDS[kind](**{"embed_dim": 4, "hidden_dim": 6, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_device_and_dtype_are_those_asked_for(kind: str) -> None:
    module = KINDS[kind](4, 6, device="meta", dtype=torch.bfloat16)
    assert {(parameter.device.type, parameter.dtype) for parameter in module.parameters()} == {("meta", torch.bfloat16)}
