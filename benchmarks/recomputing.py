"""A new token with the cache against recomputing the whole sequence and keeping the last output."""

import torch

from transformer import MultiHeadAttention
from transformer.positions import RotaryEmbedding

from .peers import llama_whole
from .timing import medians, microseconds, print_table

EMBED_DIM, NUM_HEADS = 512, 8


@torch.inference_mode()
def run(contexts: tuple[int, ...] = (50, 200, 1000), rounds: int = 8) -> None:
    """Prints microseconds per new token both ways, and that recomputing is no slower than a peer's."""
    body = []
    for context in contexts:
        attention = MultiHeadAttention(
            EMBED_DIM, NUM_HEADS, True, bias=False, position=RotaryEmbedding(EMBED_DIM // NUM_HEADS)
        ).eval()
        sequence = torch.randn(1, context, EMBED_DIM)
        new = torch.randn(1, 1, EMBED_DIM)
        cached = MultiHeadAttention(
            EMBED_DIM, NUM_HEADS, True, True, bias=False, position=RotaryEmbedding(EMBED_DIM // NUM_HEADS)
        ).eval()
        cached(sequence)
        peer = llama_whole(EMBED_DIM, NUM_HEADS, NUM_HEADS)
        seconds = medians(
            {
                "cached": lambda module=cached, x=new: module(x),
                "recomputing": lambda module=attention, x=sequence: module(x)[:, -1],
                "transformers": lambda module=peer, x=sequence: module(x)[:, -1],
            },
            rounds,
            f"recomputing {context} tokens",
            burst=20,
        )
        body.append(
            [
                f"{context:,}",
                *(microseconds(seconds[name]) for name in ("cached", "recomputing", "transformers")),
                f"{seconds['recomputing'] / seconds['cached']:.1f}",
                f"{seconds['transformers'] / seconds['recomputing']:.2f}",
            ]
        )
    print_table(
        f"One new token, microseconds (E {EMBED_DIM}, H {NUM_HEADS}, G {NUM_HEADS}, float32)",
        ["context", "cached", "recomputing", "transformers recomputing", "x by the cache", "recomputing x peer"],
        body,
    )
