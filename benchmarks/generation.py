"""A whole model writing, with its caches and without, beside transformers without."""

import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transformer.models import DecoderOnlyTransformer, compare_generation

from .timing import print_table

VOCAB_SIZE, D_MODEL, NUM_HEADS, D_FF, NUM_LAYERS, PROMPT = 1000, 512, 8, 2048, 6, 16


def peer() -> LlamaForCausalLM:
    """transformers' model of the same shape."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=D_MODEL,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        intermediate_size=D_FF,
        num_hidden_layers=NUM_LAYERS,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def run(lengths: tuple[int, ...] = (10, 50, 100, 200, 256), runs: int = 3) -> None:
    """Prints the comparison's table, and seconds of transformers' uncached generation beside our own."""
    model = DecoderOnlyTransformer(VOCAB_SIZE, D_MODEL, NUM_HEADS, D_FF, NUM_LAYERS).eval()
    other, prompt = peer(), torch.randint(VOCAB_SIZE, (1, PROMPT))
    body = []
    for length in lengths:
        (row,) = compare_generation(model, (length,), runs=runs, prompt=prompt)
        seconds = []
        for _ in range(runs):
            began = time.perf_counter()
            other.generate(prompt, min_new_tokens=length, max_new_tokens=length, do_sample=False, use_cache=False)
            seconds.append(time.perf_counter() - began)
        cached, uncached = row.tokens_per_second
        theirs = statistics.median(seconds)
        body.append(
            [
                f"{length}",
                f"{row.seconds_cached:.3f}",
                f"{row.seconds_uncached:.3f}",
                f"{theirs:.3f}",
                f"{cached:,.0f}",
                f"{uncached:,.0f}",
                f"{row.cache_bytes:,}",
                "yes" if row.equal else "NO",
                f"{row.speed_up:.1f}",
                f"{theirs / row.seconds_uncached:.2f}",
            ]
        )
    print_table(
        f"Greedy generation after {PROMPT} tokens (V {VOCAB_SIZE}, E {D_MODEL}, H {NUM_HEADS}, hidden {D_FF}, "
        f"{NUM_LAYERS} layers, float32), seconds",
        [
            "new tokens",
            "cached",
            "uncached",
            "transformers uncached",
            "cached tokens/s",
            "uncached tokens/s",
            "cache bytes",
            "equal",
            "x by the cache",
            "uncached x peer",
        ],
        body,
    )
