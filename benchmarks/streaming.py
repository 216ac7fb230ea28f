"""Tokens one by one through a window: the time and memory of a step must not depend on how many came before."""

import resource
import statistics
import time

import torch
from tqdm import tqdm

from transformer import MultiHeadAttention
from transformer.positions import RotaryEmbedding

from .timing import microseconds, print_table

EMBED_DIM, NUM_HEADS, WINDOW = 512, 8, 512


@torch.inference_mode()
def run(tokens: int = 100_000) -> None:
    """Prints the median step, the cache's bytes and the process's peak memory at tenths of the way."""
    attention = MultiHeadAttention(
        EMBED_DIM,
        NUM_HEADS,
        True,
        True,
        bias=False,
        position=RotaryEmbedding(EMBED_DIM // NUM_HEADS),
        window_size=WINDOW,
    ).eval()
    attention(torch.randn(1, WINDOW, EMBED_DIM))
    x = torch.randn(1, 1, EMBED_DIM)
    seconds, body, marks = [], [], tokens // 10
    for count in tqdm(range(1, tokens + 1), desc=f"streaming over a window of {WINDOW}", leave=False):
        began = time.perf_counter()
        attention(x)
        seconds.append(time.perf_counter() - began)
        if count % marks == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            cache = attention.kv_cache
            body.append(
                [
                    f"{count:,}",
                    microseconds(statistics.median(seconds)),
                    f"{cache.held:,}",
                    f"{cache.nbytes:,}",
                    f"{peak:,.0f}",
                ]
            )
            seconds = []
    print_table(
        f"Streaming over a window of {WINDOW} (E {EMBED_DIM}, H {NUM_HEADS}, float32)",
        ["tokens so far", "median step, microseconds", "held", "cache bytes", "peak memory, MB"],
        body,
    )
