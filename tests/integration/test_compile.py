"""Uncached calls under `torch.compile(fullgraph=True)`: tensors only, for any length and any mask."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close

from tests.integration.builders import (
    ANYWHERE,
    ATTENTIONS,
    DECODERS,
    PADDINGS,
    decoder,
    encoder,
    encoder_decoder,
    padding,
    token_ids,
    vectors,
)
from transformer import MultiHeadAttention
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock, FeedForward, RMSNorm
from transformer.positions import RotaryEmbedding

LENGTHS = range(5, 16, 2)
"""More than graphs that are allowed."""
FEW_GRAPHS = 3
"""One for the first length, one for any length, and one in reserve."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_compiled_yet")]


def compiled(module: Callable, backend: str = "eager") -> Callable:
    return torch.compile(module, fullgraph=True, backend=backend)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def same(out: Tensor, expected: Tensor, real: Tensor | None = None, atol: float = 1e-5) -> None:
    """Equal at real tokens."""
    if real is not None:
        out, expected = out[real], expected[real]
    assert_close(out, expected, atol=atol, rtol=0)


def spoiled(x: Tensor, real: Tensor) -> Tensor:
    """NaN at padding of vectors, an id that there is not at padding of ids."""
    if x.is_floating_point():
        return x.masked_fill(~real.unsqueeze(-1), torch.nan)
    return x.masked_fill(~real, -7)


# One module of each way through the kernel; tests/positions/test_traced.py traces every scaling.
EAGER = [kind for kind in ATTENTIONS if kind not in ("rotary linear", "rotary dynamic", "rotary llama3")]


@pytest.mark.parametrize(
    ("kind", "recording"),
    [*((kind, True) for kind in EAGER), ("rotary gqa", False), ("window sinks rotary", False), ("relative", False)],
)
def test_an_attention_module_equals_itself_run_eagerly(kind: str, recording: bool) -> None:
    module, x = ATTENTIONS[kind](), vectors(4, 9)
    fast = compiled(module)
    with nullcontext() if recording else torch.no_grad():
        same(fast(x), module(x))
        for where in PADDINGS:
            real = padding(where, 4, 9)
            out = fast(x, attention_mask=real)
            same(out, module(x, attention_mask=real), real)
            assert (out[~real] == 0).all()
            same(fast(spoiled(x, real), attention_mask=real), out, atol=0)
    assert graphs() <= FEW_GRAPHS


@pytest.mark.parametrize("kind", ["window sinks rotary", "relative"])
def test_biases_weights_and_modes_of_a_call(kind: str) -> None:
    module, x, real = ATTENTIONS[kind](), vectors(3, 7), padding("both", 3, 7)
    fast = compiled(module)
    random = torch.Generator().manual_seed(3)
    score = torch.randn(3, 4, 7, 7, generator=random)
    seen = (torch.rand(7, 7, generator=random) < 0.7) | torch.eye(7, dtype=torch.bool)
    for given in ({}, {"attention_mask": real}):
        at = given.get("attention_mask")
        same(fast(x, attn_bias=score, **given), module(x, attn_bias=score, **given), at)
        same(fast(x, attn_bias=seen, **given), module(x, attn_bias=seen, **given), at)
        same(fast(x, expanding_context=True, **given), module(x, expanding_context=True, **given), at)
        out, weights = fast(x, return_weights=True, **given)
        expected, expected_weights = module(x, return_weights=True, **given)
        same(out, expected, at)
        same(weights, expected_weights)


def test_fully_masked_is_exactly_zero() -> None:
    """A query that the mask of a call leaves without a key: zero weights, and the bias of the output alone."""
    module, x = MultiHeadAttention(32, 4), vectors(2, 5).requires_grad_()
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[2] = False
    out, weights = compiled(module, "aot_eager")(x, attn_bias=seen, return_weights=True)
    assert (weights[:, :, 2] == 0).all()
    assert torch.equal(out[:, 2], module.out_proj.bias.expand(2, 32))
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["plain", "rotary partial", "softcap", "qk norm"])
def test_cross_attention(kind: str) -> None:
    module, x, kv = ATTENTIONS[kind](), vectors(4, 3), vectors(4, 6, seed=1)
    module.apply_causal_mask = False
    fast = compiled(module)
    same(fast(x, kv), module(x, kv))
    for where in PADDINGS:
        real, kv_real = padding("right", 4, 5)[:, 2:], padding(where, 4, 6)
        same(fast(x, kv, kv_mask=kv_real), module(x, kv, kv_mask=kv_real))
        same(fast(x, spoiled(kv, kv_real), kv_mask=kv_real), fast(x, kv, kv_mask=kv_real), atol=0)
        out = fast(x, kv, attention_mask=real, kv_mask=kv_real)
        same(out, module(x, kv, attention_mask=real, kv_mask=kv_real), real)
        assert (out[~real] == 0).all()
    assert graphs() <= 3 * FEW_GRAPHS


# `test_many_lengths_make_few_graphs` runs the others, without padding that holds what is no id.
@pytest.mark.parametrize("kind", ["gqa qk norm", "sinusoidal", "relative", "window sinks"])
def test_a_decoder(kind: str) -> None:
    model, ids = decoder(**DECODERS[kind]), token_ids(4, 9)
    fast = compiled(model)
    with torch.no_grad():
        same(fast(ids), model(ids))
        for where in PADDINGS:
            real = padding(where, 4, 9)
            out = fast(ids, real)
            same(out, model(ids, real), real)
            same(fast(spoiled(ids, real), real), out, real, atol=0)
        same(fast(ids, logits_to_keep=1), model(ids)[:, -1:])


@pytest.mark.parametrize("kind", ["rotary yarn", "relative", "sinusoidal"])
def test_an_encoder(kind: str) -> None:
    options = ANYWHERE[kind]
    model, ids = encoder(num_token_types=2, embedding_norm=True, **options), token_ids(4, 9)
    fast = compiled(model)
    with torch.no_grad():
        same(fast(ids), model(ids))
        for where in PADDINGS:
            real = padding(where, 4, 9)
            same(fast(spoiled(ids, real), real), model(ids, real), real)


@pytest.mark.parametrize("kind", ["relative", "learned", "mixed pattern"])
def test_an_encoder_decoder(kind: str) -> None:
    model, source, target = encoder_decoder(**DECODERS[kind]), token_ids(4, 8), token_ids(4, 6, seed=1)
    fast = compiled(model)
    with torch.no_grad():
        same(fast(source, target), model(source, target))
        for where in PADDINGS:
            masks = padding(where, 4, 8), padding(where, 4, 6)
            expected = model(source, target, *masks)
            same(fast(spoiled(source, masks[0]), spoiled(target, masks[1]), *masks), expected, masks[1])


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (decoder, "gqa qk norm"),
        (decoder, "relative"),
        (decoder, "alibi"),
        (encoder, "relative"),
        (encoder_decoder, "gqa qk norm"),
    ],
)
def test_training_gives_the_same_gradients(build: Callable, kind: str) -> None:
    gradients = []
    real, ids = padding("both", 4, 9), token_ids(4, 9)
    for run in (lambda model: model, lambda model: compiled(model, "aot_eager")):
        model = build(**ANYWHERE[kind]).train()
        arguments = (ids, ids, real, real) if build is encoder_decoder else (ids, real)
        run(model)(*arguments)[real].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def by_length(module: nn.Module, length: int, masks: list[Tensor]) -> list[tuple[tuple, dict]]:
    """Calls of one length, without a mask where there are none."""
    if isinstance(module, MultiHeadAttention | BlockStack):
        return [((vectors(3, length),), {"attention_mask": mask}) for mask in masks or [None]]
    if type(module).__name__ == "EncoderDecoderTransformer":
        source, target = token_ids(3, length + 2), token_ids(3, length)
        wide = [nn.functional.pad(mask, (2, 0), value=True) for mask in masks]
        return [((source, target, *pair), {}) for pair in zip(wide, masks, strict=True)] or [((source, target), {})]
    return [((token_ids(3, length), *given), {}) for given in ([mask] for mask in masks or [None])]


SUBJECTS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: MultiHeadAttention(32, 4, True, position=RotaryEmbedding(8)),
    "window and sinks": lambda: MultiHeadAttention(32, 4, True, window_size=4, num_sinks=1),
    "decoder": decoder,
    "alibi decoder": lambda: decoder(position="alibi"),
    "relative decoder": lambda: decoder(position="relative"),
    "learned decoder": lambda: decoder(position="learned", max_length=64),
    "mixed decoder": lambda: decoder(window_size=4, layer_pattern="sliding full"),
    "encoder": encoder,
    "encoder decoder": encoder_decoder,
}


@pytest.mark.parametrize(
    ("subject", "masked"),
    [*((subject, True) for subject in SUBJECTS), ("window and sinks", False), ("decoder", False), ("encoder", False)],
)
def test_many_lengths_make_few_graphs(subject: str, masked: bool) -> None:
    """Nor does a mask of other contents make one of its own."""
    module = SUBJECTS[subject]().eval()
    fast = compiled(module)
    with torch.no_grad():
        for length in LENGTHS:
            for arguments, given in by_length(
                module, length, [padding(where, 3, length) for where in PADDINGS] if masked else []
            ):
                real = given.get("attention_mask", arguments[-1] if masked else None)
                same(fast(*arguments, **given), module(*arguments, **given), real)
    assert graphs() <= FEW_GRAPHS


def block(kind: type = DecoderBlock, window: int | None = None) -> nn.Module:
    attention = MultiHeadAttention(
        32, 4, kind is DecoderBlock, position=RotaryEmbedding(8), window_size=window, num_sinks=int(window is not None)
    )
    return kind(attention, FeedForward(32, 64), RMSNorm)


@pytest.mark.parametrize("kind", [DecoderBlock, EncoderBlock])
def test_a_block_that_is_checkpointed(kind: type) -> None:
    inner, x, real = block(kind), vectors(3, 7), padding("left", 3, 7)
    fast = compiled(checkpoint_wrapper(inner), "aot_eager")
    for given in ({}, {"attention_mask": real}):
        wanted = torch.autograd.grad(inner(x, **given)[real].sum(), inner.parameters())
        got = torch.autograd.grad(fast(x, **given)[real].sum(), inner.parameters())
        assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_compiled_blocks_in_a_stack(masked: bool) -> None:
    plain = BlockStack([block(), block(window=4)], RMSNorm(32)).eval()
    stack = BlockStack([compiled(each) for each in plain.blocks], plain.norm).eval()
    with torch.no_grad():
        for length in LENGTHS:
            x, real = vectors(3, length), padding("left", 3, length) if masked else None
            same(stack(x, attention_mask=real), plain(x, attention_mask=real), real)
    assert graphs() <= FEW_GRAPHS * len(plain.blocks)
