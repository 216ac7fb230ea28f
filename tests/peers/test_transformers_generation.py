"""Tokens, scores and beams of transformers' Llama, written by our model with its weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.variants import ids
from tests.peers.models import copy_weights, fill
from tests.peers.test_transformers_blocks import LLAMA, rope
from tests.setups import padding
from transformer.models import DecoderOnlyTransformer

VOCAB = 13
PROMPT, REAL = ids(3, 5, VOCAB), padding([(0, 5), (2, 3), (4, 1)], 5)


@pytest.fixture(scope="module")
def pair() -> tuple[DecoderOnlyTransformer, nn.Module]:
    """The same weights in float32, with theirs of a norm that keeps the logits apart."""
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-3,
            rope_parameters=rope(500.0),
            tie_word_embeddings=False,
        )
    ).eval()
    fill(theirs)
    theirs.generation_config.update(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    ours = DecoderOnlyTransformer(
        VOCAB,
        24,
        4,
        40,
        2,
        attention="gqa",
        num_groups=2,
        rotary_base=500.0,
        norm_eps=1e-3,
        tied_embeddings=False,
    ).eval()
    copy_weights(ours.decoder, theirs.model, "layers", LLAMA, {"norm": "norm"})
    ours.embedding.tokens.load_state_dict(theirs.model.embed_tokens.state_dict())
    ours.head.proj.load_state_dict(theirs.lm_head.state_dict())
    return ours, theirs


def written_by(theirs: nn.Module, prompt: Tensor, real: Tensor | None = None, **options: object) -> Tensor:
    mask = torch.ones_like(prompt) if real is None else real.long()
    return theirs.generate(prompt, attention_mask=mask, **options)


@torch.no_grad()
def test_logits(pair: tuple[DecoderOnlyTransformer, nn.Module]) -> None:
    ours, theirs = pair
    torch.testing.assert_close(ours(PROMPT), theirs(PROMPT).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.6}])
def test_greedy(pair: tuple[DecoderOnlyTransformer, nn.Module], options: dict[str, float]) -> None:
    """Prompts of three lengths, padded on the left as theirs have to be."""
    ours, theirs = pair
    for real in (None, REAL):
        prompt = PROMPT if real is None else PROMPT.masked_fill(~REAL, 0)
        if options:
            # Theirs count padding as tokens that the row holds.
            prompt, real = prompt[:, 2:], None
        out = ours.generate(prompt, real, max_new_tokens=8, **options)
        assert torch.equal(out, written_by(theirs, prompt, real, max_new_tokens=8, do_sample=False, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"temperature": 1.5, "top_k": 4},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 1.5, "min_p": 0.15},
        {"temperature": 2.0, "top_k": 8, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
    ],
)
def test_sampling_by_the_same_dice(pair: tuple[DecoderOnlyTransformer, nn.Module], options: dict[str, float]) -> None:
    """Their filters in their order: from the global generator of one seed come the same tokens."""
    ours, theirs = pair
    torch.manual_seed(3)
    expected = written_by(theirs, PROMPT, max_new_tokens=8, do_sample=True, **{"top_k": 0, **options})
    torch.manual_seed(3)
    assert torch.equal(ours.generate(PROMPT, max_new_tokens=8, **options), expected)


@pytest.mark.parametrize("stop", [None, 4, 7])
@pytest.mark.parametrize("penalty", [1.0, 0.0, -1.0, 2.0])
def test_beams(pair: tuple[DecoderOnlyTransformer, nn.Module], penalty: float, stop: int | None) -> None:
    """`early_stopping="never"` is the rule that looks as far as a better continuation is possible."""
    ours, theirs = pair
    for row in range(3):
        for beams, best in ((2, 1), (3, 3)):
            given = {"max_new_tokens": 7, "num_beams": beams, "num_return_sequences": best, "length_penalty": penalty}
            prompt = PROMPT[row : row + 1]
            expected = written_by(
                theirs, prompt, early_stopping="never", do_sample=False, eos_token_id=stop, pad_token_id=stop, **given
            )
            stops = () if stop is None else (stop,)
            out = ours.generate(prompt, stop_tokens=stops, **given)
            assert out.tolist() == expected.tolist()
