"""Mixture of experts: by its formula in every way of computing it, its gradients, its loss, and where it may stand."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.blocks.loops import ACTIVATIONS, Vector, each, linear
from tests.setups import fill, tokens
from transformer import DecoderOnlyTransformer, MultiHeadAttention
from transformer.blocks import (
    BlockStack,
    DecoderBlock,
    GatedFeedForward,
    MixtureOfExperts,
    RMSNorm,
    load_balancing_loss,
    router_logits,
)
from transformer.checkpoints import load_model, save_model
from transformer.engines import as_pretrained
from transformer.errors import ArgumentError, ConfigurationError
from transformer.models import Composition, composed, composition_of

E, HIDDEN, EXPERTS = 5, 7, 8


def made(chosen: int = 2, *, experts: int = EXPERTS, dtype: torch.dtype = torch.float64, **options) -> MixtureOfExperts:
    module = MixtureOfExperts(E, HIDDEN, experts, chosen, **options)
    fill(module, 3)
    return module.to(dtype)


class _Expert:
    """One expert's layers, in the form that the loops read."""

    def __init__(self, layers: nn.Module, number: int) -> None:
        self.weight = layers.weight[number]
        self.bias = None if layers.bias is None else layers.bias[number]
        self.out_features = layers.out_features


def formula(module: MixtureOfExperts, vector: Vector) -> Vector:
    """Each expert's output times the probability of the expert, over the most probable experts."""
    logits = linear(module.router, vector)
    powers = [math.exp(logit - max(logits)) for logit in logits]
    best = sorted(range(len(logits)), key=lambda expert: -logits[expert])[: module.experts_per_token]
    whole = sum(powers[expert] for expert in best) if module.normalize_weights else sum(powers)
    out = [0.0] * E
    for number in best:
        gates, ups = (linear(_Expert(each, number), vector) for each in (module.gate_proj, module.up_proj))
        hidden = [ACTIVATIONS["silu"](gate) * up for gate, up in zip(gates, ups, strict=True)]
        expert_out = linear(_Expert(module.down_proj, number), hidden)
        out = [sum_ + powers[number] / whole * value for sum_, value in zip(out, expert_out, strict=True)]
    return out


def on_a_device(module: MixtureOfExperts, x: Tensor) -> Tensor:
    """As where the host cannot look: gathered weights for few tokens, all experts for more."""
    return torch.func.vmap(module)(x.unsqueeze(0)).squeeze(0)


@pytest.mark.parametrize("options", [{}, {"normalize_weights": False, "bias": True}], ids=str)
@pytest.mark.parametrize("chosen", [1, 2, EXPERTS])
def test_by_formula(chosen: int, options: dict) -> None:
    module = made(chosen, **options)
    for shape in ((2, 6, E), (1, 1, E), (2, 0, E)):
        x = tokens(*shape)
        expected = each(partial(formula, module), x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for out in (module(x), on_a_device(module, x)):
                    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def test_each_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are gathered where that reads less than all experts, in eager mode and while traced."""
    taken: list[str] = []
    for name in ("_grouped", "_gathered", "_dense"):
        way = getattr(MixtureOfExperts, name)
        monkeypatch.setattr(
            MixtureOfExperts, name, lambda *given, way=way, name=name: (taken.append(name), way(*given))[1]
        )
    module = made(2)
    for x in (tokens(1, 1, E), tokens(1, 2, E)):
        module(x)
        on_a_device(module, x)
    assert taken == ["_grouped", "_gathered", "_grouped", "_dense"]


def test_gradients_are_those_of_all_experts() -> None:
    """Of every parameter and of the input; experts that no token chose have gradients of zeros."""
    module, x = made(2, bias=True), tokens(1, 3, E)
    grads = []
    for way in (module, partial(on_a_device, module)):
        given = x.clone().requires_grad_()
        out = way(given)
        grads.append(torch.autograd.grad((out * tokens(1, 3, E, seed=7)).sum(), [given, *module.parameters()]))
    for grouped, dense in zip(*grads, strict=True):
        torch.testing.assert_close(grouped, dense, atol=1e-12, rtol=0)
    of_gates = dict(zip(["x", *dict(module.named_parameters())], grads[0], strict=True))["gate_proj.weight"]
    assert 0 < (of_gates.abs().sum((1, 2)) == 0).sum() < EXPERTS


def test_a_token_is_alone() -> None:
    """Neither an infinite expert that a token did not choose nor another token that is NaN reaches it."""
    module = made(2)
    x = tokens(1, 6, E)
    x[0, 2] = math.nan
    chosen = module.router(x[0, [0, 1, 3, 4, 5]]).topk(2).indices.unique().tolist()
    expected = torch.cat([module(x[:, i : i + 1]) for i in range(6)], 1)
    for number in set(range(EXPERTS)) - set(chosen):
        module.down_proj.weight.data[number] = math.inf
    for out in (module(x), on_a_device(module, x)):
        assert out[0, 2].isnan().all()
        torch.testing.assert_close(out[0, [0, 1, 3, 4, 5]], expected[0, [0, 1, 3, 4, 5]], atol=1e-12, rtol=0)


def test_one_graph_for_every_length() -> None:
    compiled = torch.compile(made(2), backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for length in (4, 7, 3):
            x = tokens(2, length, E)
            torch.testing.assert_close(compiled(x), made(2)(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_few_rows_over_many_weights(dtype: torch.dtype) -> None:
    """Large enough for the kernels of few rows."""
    module = MixtureOfExperts(256, 320, 4, 2)
    fill(module, 3)
    for shape in ((1, 1, 256), (1, 3, 256), (2, 9, 256)):
        x = tokens(*shape, dtype=dtype)
        exact = module.double()(x.double())
        out = module.to(dtype)(x)
        assert out.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(out.double(), exact, atol=tolerance * exact.abs().max().item(), rtol=0)
        module.float()
        fill(module, 3)


def test_autocast_and_dropout() -> None:
    module = made(2, dtype=torch.float32)
    x = tokens(1, 4, E, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == GatedFeedForward(E, HIDDEN)(x).dtype == torch.bfloat16
    module.dropout = 0.5
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def model_of(layers: str) -> DecoderOnlyTransformer:
    """Layers of kinds, by their first letters: "m" a mixture, "g" a gated network."""
    blocks = [
        DecoderBlock(
            MultiHeadAttention(16, 2, True),
            MixtureOfExperts(16, 12, 4, 2, dropout=0.0) if kind == "m" else GatedFeedForward(16, 24),
            RMSNorm,
        )
        for kind in layers
    ]
    model = DecoderOnlyTransformer.from_parts(
        nn.Embedding(11, 16), BlockStack(blocks, RMSNorm(16)), nn.Linear(16, 11, False)
    )
    fill(model, 1)
    return model.eval()


def test_layers_that_differ_are_read_and_saved(tmp_path: Path) -> None:
    model = model_of("mgm")
    found = composition_of(model)
    assert [layer.options.feed_forward for layer in found.layers] == ["mixture", "gated", "mixture"]
    assert composition_of(composed(found)) == found
    save_model(model, tmp_path / "saved")
    again, ids = load_model(tmp_path / "saved"), torch.randint(11, (2, 6))
    assert torch.equal(again(ids), model(ids))
    with pytest.raises(ConfigurationError, match="feed_forward: expected 'gated' or 'plain', which engines run"):
        as_pretrained(model)
    by_options = model_of("mm")
    assert not composition_of(by_options).layers
    assert isinstance(composition_of(by_options), Composition)


def test_the_loss_is_that_of_transformers() -> None:
    """Over the real tokens of all layers, whichever side padding is on; and it reaches the routers."""
    model, ids = model_of("mgm"), torch.randint(11, (3, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    for attention_mask in (None, mask):
        with router_logits(model) as logits:
            model(ids, attention_mask)
        assert [tuple(each.shape) for each in logits] == [(3, 6, 4)] * 2
        loss = load_balancing_loss(logits, 2, attention_mask)
        flat = tuple(each.flatten(0, 1) for each in logits)
        torch.testing.assert_close(loss, load_balancing_loss_func(flat, 4, 2, attention_mask))
        loss.backward()
        for number in (0, 2):
            assert model.decoder.blocks[number].feed_forward.router.weight.grad.abs().sum() > 0
    model(ids)
    assert len(logits) == 2
    assert load_balancing_loss([torch.eye(4).unsqueeze(0)] * 2, 1) == pytest.approx(1.0)


def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match="experts_per_token: expected at most num_experts=2, got 3"):
        MixtureOfExperts(E, HIDDEN, 2, 3)
    with pytest.raises(ConfigurationError, match="feed_forward: expected embed_dim=8, as attention, got 5"):
        DecoderBlock(MultiHeadAttention(8, 2, True), made(), RMSNorm)
    sizes = {"vocab_size": 9, "d_model": 8, "num_heads": 2, "d_ff": 8, "num_layers": 1}
    for options, message in (
        ({"feed_forward": "mixture"}, "num_experts, experts_per_token: expected numbers"),
        ({"num_experts": 4, "experts_per_token": 2}, "and None else, got 4 and 2 with 'gated'"),
        ({"feed_forward": "mixture", "num_experts": 4, "experts_per_token": 5}, "expected at most num_experts=4"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            DecoderOnlyTransformer(**sizes, **options)
    with pytest.raises(ArgumentError, match="model: expected one with a MixtureOfExperts"), router_logits(nn.ReLU()):
        pass
    logits = torch.zeros(2, 3, 4)
    for given, match in (
        (([], 2), "logits: expected one"),
        (([logits, logits[:1]], 2), "logits: expected one"),
        (([logits], 5), "experts_per_token: expected 1 to 4, got 5"),
        (([logits], 2, torch.ones(2, 2)), "attention_mask: expected"),
    ):
        with pytest.raises(ArgumentError, match=match):
            load_balancing_loss(*given)
