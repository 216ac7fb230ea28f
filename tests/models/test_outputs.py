"""Attention weights and hidden states of whole models: those of transformers with the same weights, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    UMT5Config,
)

from tests.checkpoints import theirs as decoders
from tests.checkpoints.test_bert import CONFIG as BERT
from tests.checkpoints.test_t5 import SIZES as T5_SIZES
from tests.checkpoints.theirs import VOCAB, ids
from tests.peers.models import fill, no_float32
from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer
from transformer.attention import MultiHeadAttention
from transformer.blocks import BlockStack, EncoderBlock, FeedForward, RMSNorm
from transformer.checkpoints import load_model
from transformer.errors import ArgumentError
from transformer.models import EncoderTransformer, ModelOutput, UMT5Model

ASKED = {"output_attentions": True, "output_hidden_states": True}
LENGTH, CUT = 11, 6
LEFT = torch.ones(3, LENGTH, dtype=torch.int64)
LEFT[1, :4] = 0
LEFT[2, :9] = 0
MASKS = {"no padding": None, "left": LEFT, "right": LEFT.flip(1)}

SEQ2SEQ: dict[str, PreTrainedConfig] = {
    "t5": T5Config(**T5_SIZES),
    "umt5": UMT5Config(**T5_SIZES, feed_forward_proj="gated-gelu"),
}
FAMILIES = ["llama", "gpt2", "gemma2", "mistral", "qwen3"]


class Pair(NamedTuple):
    ours: DecoderOnlyTransformer | EncoderTransformer | EncoderDecoderTransformer | UMT5Model
    theirs: PreTrainedModel


def pair_of(theirs: PreTrainedModel, folder: Path) -> Pair:
    """Both in float64, theirs with the attention that gives its weights."""
    theirs.save_pretrained(folder)
    theirs.set_attn_implementation("eager")
    return Pair(load_model(folder, torch.float64), theirs)


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    with no_float32():  # their rotary frequencies too
        theirs = decoders.make(decoders.CASES[request.param])
    return pair_of(theirs, tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module", params=SEQ2SEQ)
def seq2seq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    theirs = AutoModelForSeq2SeqLM.from_config(deepcopy(SEQ2SEQ[request.param]), dtype=torch.float64).eval()
    fill(theirs)
    return pair_of(theirs, tmp_path_factory.mktemp("theirs"))


def same(ours: tuple[Tensor, ...] | None, theirs: tuple[Tensor, ...], real: Tensor | None, dim: int) -> None:
    """As many tensors with equal numbers; along the L tokens of dimension `dim` only the real ones count."""
    assert ours is not None
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        if real is not None:
            kept = real.bool().view(real.shape[0], *[1] * (dim - 1), real.shape[1], 1)
            own, other = own.masked_fill(~kept, 0.0), other.masked_fill(~kept, 0.0)
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9 * max(1.0, other.abs().max().item()))


# --- equal to theirs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_decoder_only(decoder: Pair, mask: Tensor | None) -> None:
    tokens = ids(3, LENGTH)
    output = decoder.ours(tokens, mask, **ASKED)
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with no_float32():
        expected = decoder.theirs(tokens, attention_mask=mask, position_ids=positions, **ASKED)
    assert isinstance(output, ModelOutput)
    assert len(output.hidden_states) == 1 + len(output.attentions)
    same(output.hidden_states, expected.hidden_states, mask, 1)
    same(output.attentions, expected.attentions, mask, 2)
    same((output.logits,), (expected.logits,), mask, 1)
    assert output.hidden_states[-1] is output.last_hidden_state
    assert output[4:] == (None,) * 5


@torch.no_grad()
def test_cached(decoder: Pair) -> None:
    """Of the second of two chunks: columns are the tokens that were cached, then its own."""
    tokens = ids(3, LENGTH)
    decoder.ours.enable_cache()
    try:
        first = decoder.ours(tokens[:, :CUT], **ASKED)
        second = decoder.ours(tokens[:, CUT:], **ASKED)
    finally:
        decoder.ours.disable_cache()
    whole = decoder.ours(tokens, **ASKED)
    joined = tuple(torch.cat(both, 1) for both in zip(first.hidden_states, second.hidden_states, strict=True))
    same(joined, whole.hidden_states, None, 1)
    same(first.attentions, tuple(weights[:, :, :CUT, :CUT] for weights in whole.attentions), None, 2)
    for own, weights in zip(second.attentions, whole.attentions, strict=True):
        assert torch.all(weights[:, :, CUT:, : LENGTH - own.shape[3]] == 0)
        same((own,), (weights[:, :, CUT:, -own.shape[3] :],), None, 2)
    with no_float32():
        known = decoder.theirs(tokens[:, :CUT], use_cache=True).past_key_values
        expected = decoder.theirs(tokens[:, CUT:], past_key_values=known, **ASKED)
    same(second.hidden_states, expected.hidden_states, None, 1)
    for own, weights in zip(second.attentions, expected.attentions, strict=True):
        width = min(own.shape[3], weights.shape[3])
        same((own[..., -width:],), (weights[..., -width:],), None, 2)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_encoder(tmp_path: Path, mask: Tensor | None) -> None:
    theirs = AutoModel.from_config(deepcopy(BERT), dtype=torch.float64).eval()
    fill(theirs)
    pair = pair_of(theirs, tmp_path)
    # Right to the positions that it has learned: padding on the left takes none here, and one there.
    given = None if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    tokens = ids(3, LENGTH)
    output = pair.ours(tokens, mask, **ASKED)
    with no_float32():
        expected = pair.theirs(tokens, attention_mask=mask, **given or {}, **ASKED)
    same(output.hidden_states, expected.hidden_states, mask, 1)
    same(output.attentions, expected.attentions, mask, 2)
    same((output.last_hidden_state,), (expected.last_hidden_state,), mask, 1)
    assert output.logits is None


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_encoder_decoder(seq2seq: Pair, mask: Tensor | None) -> None:
    source, target = ids(3, LENGTH), ids(3, 5, seed=2)
    output = seq2seq.ours(source, target, mask, **ASKED)
    with no_float32():
        expected = seq2seq.theirs(source, mask, decoder_input_ids=target, use_cache=False, **ASKED)
    same(output.hidden_states, expected.decoder_hidden_states, None, 1)
    same(output.attentions, expected.decoder_attentions, None, 2)
    same(output.cross_attentions, expected.cross_attentions, None, 2)
    same(output.encoder_hidden_states, expected.encoder_hidden_states, mask, 1)
    same(output.encoder_attentions, expected.encoder_attentions, mask, 2)
    same((output.encoder_last_hidden_state,), (expected.encoder_last_hidden_state,), mask, 1)
    same((output.logits,), (expected.logits,), None, 1)


@torch.no_grad()
def test_encoder_decoder_in_two_chunks(seq2seq: Pair) -> None:
    """With given encoder states, which have no attention weights of their own."""
    ours = seq2seq.ours.transformer if isinstance(seq2seq.ours, UMT5Model) else seq2seq.ours
    source, target = ids(3, LENGTH), ids(3, 5, seed=2)
    whole = ours(source, target, **ASKED)
    states = ours(source, **ASKED)
    assert states.logits is None
    same(states.encoder_hidden_states, whole.encoder_hidden_states, None, 1)
    same((states.last_hidden_state,), (whole.encoder_last_hidden_state,), None, 1)
    ours.enable_cache()
    try:
        given = {"encoder_hidden_states": states.last_hidden_state, **ASKED}
        parts = [ours(target_ids=part, **given) for part in target.split([3, 2], 1)]
    finally:
        ours.disable_cache()
    for field in ("hidden_states", "cross_attentions"):
        joined = tuple(torch.cat(both, -2) for both in zip(*(getattr(part, field) for part in parts), strict=True))
        same(joined, getattr(whole, field), None, 1)
    same(parts[1].attentions, tuple(weights[:, :, 3:] for weights in whole.attentions), None, 2)
    assert parts[0].encoder_hidden_states is None is parts[0].encoder_attentions
    assert parts[0].encoder_last_hidden_state is states.last_hidden_state


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- what is asked for ------------------------------------------------------------------------------------------------


def small(**options: object) -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(VOCAB, 16, 2, 24, 2, **options).eval()


@torch.no_grad()
def test_each_flag_alone() -> None:
    model, tokens = small(), ids(2, 5)
    plain = model(tokens)
    for nothing in (None, False):
        assert torch.equal(model(tokens, output_attentions=nothing, output_hidden_states=nothing), plain)
    weights, states = model(tokens, output_attentions=True), model(tokens, output_hidden_states=True)
    assert weights.hidden_states is None
    assert states.attentions is None
    assert len(weights.attentions) == 2
    assert len(states.hidden_states) == 3
    assert torch.equal(states.logits, plain)
    torch.testing.assert_close(weights.logits, plain)
    assert torch.equal(states.last_hidden_state, model.states(tokens))


@torch.no_grad()
def test_logits_to_keep_leaves_the_rest_whole() -> None:
    output = small()(ids(2, 5), logits_to_keep=1, **ASKED)
    assert output.logits.shape == (2, 1, VOCAB)
    assert output.last_hidden_state.shape == (2, 5, 16)
    assert output.attentions[0].shape == (2, 2, 5, 5)


@torch.no_grad()
def test_a_model_without_a_head() -> None:
    output = small(has_head=False)(ids(2, 5), **ASKED)
    assert output.logits is None
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])


@pytest.mark.parametrize("flag", ["output_attentions", "output_hidden_states"])
def test_flags_are_flags(flag: str) -> None:
    with pytest.raises(ArgumentError, match=f"{flag}: expected True, False or None, got 1"):
        small()(ids(1, 3), **{flag: 1})


@pytest.mark.parametrize("mode", [True, False])
def test_gradients_flow_through_what_is_returned(mode: bool) -> None:
    model = small().train(mode)
    output = model(ids(2, 5), **ASKED)
    for tensors in (output.hidden_states, output.attentions):
        for tensor in tensors:
            model.zero_grad()
            tensor.square().sum().backward(retain_graph=True)
            assert model.embedding.tokens.weight.grad.abs().sum() > 0


def test_weights_are_those_before_dropout() -> None:
    output = small(dropout=0.9).train()(ids(2, 5), **ASKED)
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))


@torch.no_grad()
def test_weights_of_padding_are_zero() -> None:
    for mask in (LEFT, LEFT.flip(1)):
        for weights in small()(ids(3, LENGTH), mask, **ASKED).attentions:
            assert torch.equal(weights.sum(-1) > 0, mask.bool()[:, None, :].expand(-1, 2, -1))
            assert torch.all(weights.transpose(2, 3)[~mask.bool()[:, None, :].expand(-1, 2, -1)] == 0)


@torch.no_grad()
def test_a_call_that_raises_leaves_the_cache() -> None:
    model, tokens = small().enable_cache(), ids(2, 9)
    model(tokens[:, :5])
    model.decoder.blocks[1].feed_forward.forward = None
    with pytest.raises(TypeError):
        model(tokens[:, 5:], **ASKED)
    assert model.kv_cache.lengths.tolist() == [5, 5]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_without_a_cache_is_one_graph() -> None:
    model, tokens = small(), ids(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, output = model(tokens, **ASKED), compiled(tokens, **ASKED)
    torch.testing.assert_close(output.hidden_states, expected.hidden_states)
    torch.testing.assert_close(output.attentions, expected.attentions)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_steps_give_states_and_refuse_weights() -> None:
    model, tokens = small().enable_cache(max_length=16), ids(2, 7)
    expected = small()(tokens, **ASKED)
    model(tokens[:, :5])
    model.kv_cache.freeze_layout()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output = compiled(tokens[:, 5:6], output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states, tuple(states[:, 5:6] for states in expected.hidden_states))
    with pytest.raises(Exception, match="for other masks, biases and weights call the module as it is"):
        compiled(tokens[:, 6:], **ASKED)
    assert model.kv_cache.lengths.tolist() == [6, 6]


# --- stacks of one's own ----------------------------------------------------------------------------------------------


class Own(torch.nn.Module):
    """A user's own block, which does not give its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = EncoderBlock(MultiHeadAttention(16, 2), FeedForward(16, 16), RMSNorm)

    def forward(self, x: Tensor, step: object = None) -> Tensor:
        return self.inner(x, step=step)


class Swallows(Own):
    """One that takes any keyword, and does not heed it."""

    def forward(self, x: Tensor, step: object = None, **ignored: object) -> Tensor:
        return self.inner(x, step=step)


@pytest.mark.parametrize("kind", [Own, Swallows])
def test_a_block_without_weights_is_named(kind: type[Own]) -> None:
    stack = BlockStack([Own().inner, kind()])
    x = torch.randn(2, 3, 16)
    assert len(stack(x, output_hidden_states=True).hidden_states) == 3
    with pytest.raises(ArgumentError, match=f"output_attentions: expected blocks .* block 1, {kind.__name__}"):
        stack(x, output_attentions=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_weights_of_a_checkpointed_block_carry_their_graph(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Own):
        def forward(self, x: Tensor, **given: object) -> object:
            return (
                checkpoint(self.inner, x, **given, use_reentrant=False)
                if not reentrant
                else checkpoint(lambda states: self.inner(states, **given), x, use_reentrant=True)
            )

    stack = BlockStack([Checkpointed()])
    x = torch.randn(2, 3, 16, requires_grad=True)
    output = stack(x, output_attentions=True)
    output.attentions[0].square().sum().backward()
    assert x.grad.abs().sum() > 0
