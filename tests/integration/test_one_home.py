"""Facts with one home: learned biases, a norm's eps and default dtypes are read at each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.models.variants import decoder_only, encoder_decoder, ids
from tests.oracle import Options
from tests.setups import SCHEMES, build, fill, padding, tokens
from transformer.blocks import LayerNorm, RMSNorm

X, REAL, PROMPT = tokens(2, 5, 16), padding([(0, 5), (1, 3)], 5), ids(2, 5)


def train(parameter: nn.Parameter, loss: Tensor, make: Callable[..., torch.optim.Optimizer]) -> None:
    """One step of an optimiser on a learned bias."""
    loss.backward()
    before = parameter.detach().clone()
    make([parameter]).step()
    assert not torch.allclose(parameter, before, atol=1e-3)


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.5),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.5, fused=True),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("scheme", ["t5 causal", "t5 bidirectional"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("cached", "grad"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_step_of_a_module_is_reused_after_training(
    name: str, scheme: str, masked: bool, cached: bool, grad: bool
) -> None:
    module = build(Options(scheme=SCHEMES[scheme], causal=scheme == "t5 causal", cached=cached))
    step = module.plan(X, None, REAL if masked else None)

    def call(**given: Any) -> Tensor:
        module.kv_cache = None
        return module(X, **given)

    with torch.set_grad_enabled(grad):
        first = call(step=step)
    train(module.position.embedding.weight, call(step=step).square().sum(), OPTIMISERS[name])
    with torch.set_grad_enabled(grad):
        again = call(step=step)
        expected = call(attention_mask=REAL if masked else None)
    assert_same(again, expected)
    assert not torch.allclose(first, expected, atol=1e-3)


@pytest.mark.parametrize("change", ["optimiser", "data", "load_state_dict"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_steps_of_a_stack_are_reused_after_training(change: str, masked: bool, grad: bool) -> None:
    """Layers of one kind share a step and the values that were computed with it."""
    stack = decoder_only("gqa relative, pattern").decoder
    steps = stack.plan(X, None, REAL if masked else None)
    embedding = stack.blocks[0].attention.position.embedding
    with torch.set_grad_enabled(grad):
        first = stack(X, steps=steps)
    if change == "optimiser":
        train(embedding.weight, stack(X, steps=steps).square().sum(), OPTIMISERS["fused AdamW"])
    elif change == "data":
        embedding.weight.data.mul_(-2)
    else:
        stack.load_state_dict({name: v * (-2 if "embedding" in name else 1) for name, v in stack.state_dict().items()})
    with torch.set_grad_enabled(grad):
        again = stack(X, steps=steps)
        expected = stack(X, attention_mask=REAL if masked else None)
    real = REAL if masked else torch.ones_like(REAL)
    assert_same(again[real], expected[real])
    assert not torch.allclose(first[real], expected[real], atol=1e-3)


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_is_trained_between_calls(cached: bool) -> None:
    """What the cache holds are keys and values: a bias is that of now."""
    model = decoder_only("gqa relative, pattern")
    embedding = model.decoder.blocks[0].attention.position.embedding
    if cached:
        model.enable_cache()
    x = model.embedding(PROMPT)
    steps = model.decoder.plan(x)
    with torch.no_grad():
        model.decoder(x, steps=steps)
    if cached:
        model.clear_cache()
    train(embedding.weight, model.decoder(x, steps=steps).square().sum(), OPTIMISERS["AdamW"])
    if cached:
        model.clear_cache()
    with torch.no_grad():
        again = model.head(model.decoder(model.embedding(PROMPT), steps=steps))
        plain = decoder_only("gqa relative, pattern")
        plain.load_state_dict(model.state_dict())
        assert_same(again, plain(PROMPT))


def test_an_encoder_decoder_is_trained_between_calls() -> None:
    model = encoder_decoder("gqa relative, pattern")
    x = model.source_embedding(PROMPT)
    steps = model.encoder.plan(x)
    embedding = model.encoder.blocks[0].attention.position.embedding
    with torch.no_grad():
        model.encoder(x, steps=steps)
    train(embedding.weight, model.encoder(x, steps=steps).square().sum(), OPTIMISERS["AdamW"])
    with torch.no_grad():
        assert_same(model.encoder(model.source_embedding(PROMPT), steps=steps), model.encode(PROMPT))


# --- eps --------------------------------------------------------------------------------------------------------------

NORMS: dict[str, Callable[..., nn.Module]] = {
    "RMSNorm": RMSNorm,
    "RMSNorm, offset": lambda dim, eps: RMSNorm(dim, eps, unit_offset=True),
    "LayerNorm": LayerNorm,
    "LayerNorm, offset": lambda dim, eps: LayerNorm(dim, eps, unit_offset=True),
    "LayerNorm without bias": lambda dim, eps: LayerNorm(dim, eps, bias=False),
}
SHAPES = {
    "one token": (1, 1, 16),
    "a token in each row": (3, 1, 16),
    "many": (2, 7, 16),
    "many rows": (20, 1, 16),
    "flat": (5, 16),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_an_eps_that_was_changed_acts(name: str, shape: str, dtype: torch.dtype, grad: bool) -> None:
    """On every path, after calls with the old one; an import of weights sets it so."""
    norm, expected = NORMS[name](16, 1e-6), NORMS[name](16, 0.5)
    fill(norm, 0), fill(expected, 0)
    norm, expected = norm.to(dtype), expected.to(dtype)
    x = tokens(*SHAPES[shape]).to(dtype)
    with torch.set_grad_enabled(grad):
        before = norm(x)
        norm.eps = 0.5
        assert_same(norm(x), expected(x), atol=0.0)
        assert not torch.allclose(norm(x), before, atol=1e-2)
        norm.eps = 1e-6
        assert_same(norm(x), before, atol=0.0)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_an_eps_that_was_changed_acts_in_a_model(norm: str, cached: bool) -> None:
    """Token by token as for the whole sequence."""
    given: dict[str, Any] = {"norm": norm, "qk_norm": True, "dtype": torch.float32}
    model, expected = decoder_only("mha rotary", **given), decoder_only("mha rotary", norm_eps=0.5, **given)
    model(PROMPT[:, :1])
    for module in model.modules():
        if isinstance(module, RMSNorm | LayerNorm):
            module.eps = 0.5
    whole = expected(PROMPT)
    assert_same(model(PROMPT), whole, atol=1e-5)
    if cached:
        model.enable_cache()
        outs = [model(PROMPT[:, at : at + 1]) for at in range(5)]
        assert_same(torch.cat(outs, 1), whole, atol=1e-5)


# --- defaults ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _defaults() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)


KINDS = [
    "mha rotary",
    "mqa alibi, window and sinks",
    "gqa relative, pattern",
    "mqa sinusoidal",
    "mha learned, after",
]


@pytest.mark.slow
@pytest.mark.usefixtures("_defaults")
@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_a_call_does_not_look_at_the_default_dtype(variant: str, own: torch.dtype, default: torch.dtype) -> None:
    """A module gives equal results with any default dtype."""
    model, again = decoder_only(variant, own), decoder_only(variant, own)
    expected = [model(PROMPT, REAL)[REAL], model.generate(PROMPT, REAL, max_new_tokens=5)]
    model.enable_cache()
    expected += [model(PROMPT[:, :3]), model(PROMPT[:, 3:])]
    torch.set_default_dtype(default)
    came = [again(PROMPT, REAL)[REAL], again.generate(PROMPT, REAL, max_new_tokens=5)]
    again.enable_cache()
    came += [again(PROMPT[:, :3]), again(PROMPT[:, 3:])]
    assert_same(came, expected, atol=0.0)


@pytest.mark.usefixtures("_defaults")
@pytest.mark.parametrize("variant", KINDS)
@torch.no_grad()
def test_a_call_does_not_look_at_the_default_device(variant: str) -> None:
    """On the CPU also where new tensors would be made on another device."""
    model = decoder_only(variant)
    expected = [model(PROMPT, REAL)[REAL], model.generate(PROMPT, REAL, max_new_tokens=5)]
    fresh = decoder_only(variant)
    torch.set_default_device("meta")
    came = [fresh(PROMPT, REAL)[REAL], fresh.generate(PROMPT, REAL, max_new_tokens=5)]
    torch.set_default_device(None)
    assert_same(came, expected)
