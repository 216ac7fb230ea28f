"""A small Llama of transformers with random weights, and our model with the same weights."""

from __future__ import annotations

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


def llama() -> tuple[DecoderOnlyTransformer, nn.Module]:
    """Ours and theirs: the same weights in float32, with theirs of a norm that keeps the logits apart."""
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
