"""A Llama of 135M parameters compared with transformers: one decoded token."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from transformer import DecoderOnlyTransformer, KVCache
from transformer.checkpoints import load_model

from .peers import CACHE
from .timing import Candidate, medians, print_table

SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)

RESET = 32
"""Tokens after which a conversation is truncated to its prompt, so that all steps have about the same length."""


def ours_decode(model: DecoderOnlyTransformer, prompt: Tensor) -> Candidate:
    """The next token, over a conversation that is truncated to its prompt at intervals."""
    model.clear_cache().enable_cache()
    state = model(prompt)[:, -1:].argmax(-1)
    cache = KVCache.from_model(model)

    def step() -> Tensor:
        nonlocal state
        if cache.length > prompt.shape[1] + RESET:
            cache.truncate(prompt.shape[1])
        state = model(state)[:, -1:].argmax(-1)
        return state

    return step


def their_decode(model: LlamaForCausalLM, prompt: Tensor) -> Candidate:
    """The same, over a DynamicCache."""
    cache = DynamicCache(config=model.config)
    state = model(prompt, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)

    def step() -> Tensor:
        nonlocal state
        if cache.get_seq_length() > prompt.shape[1] + RESET:
            cache.crop(prompt.shape[1] - cache.get_seq_length())
        state = model(state, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        return state

    return step


@torch.inference_mode()
def run(lengths: tuple[int, ...] = (16, 1024), rounds: int = 20) -> None:
    """Prints decoded tokens per second at each length."""
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "llama"
        LlamaForCausalLM(SHAPE).save_pretrained(folder)
        ours, theirs = load_model(folder), LlamaForCausalLM.from_pretrained(folder).eval()
        body = []
        for length in lengths:
            prompt = torch.randint(SHAPE.vocab_size, (1, length))
            candidates = {"ours": ours_decode(ours, prompt), "transformers": their_decode(theirs, prompt)}
            seconds = medians(candidates, rounds, f"checkpoints, {length} tokens")
            speeds = [f"{1 / seconds[name]:.1f}" for name in candidates]
            body.append([f"{length:,}", *speeds, f"{seconds['transformers'] / seconds['ours']:.2f}"])
        print_table(
            "Decoded tokens per second, Llama of 135M parameters (batch 1, float32)",
            ["tokens held", "ours", "transformers", "x transformers"],
            body,
        )
