"""One decode step of one layer against what the cache holds: rotary everywhere, float32, one new token."""

import torch

from transformer import GroupQueryAttention
from transformer.positions import RotaryEmbedding

from .peers import Step, llama_decode, x_transformers_decode
from .timing import medians, microseconds, print_table, reading

EMBED_DIM, NUM_HEADS = 1024, 16
HEAD_DIM = EMBED_DIM // NUM_HEADS


def ours(num_groups: int, batch: int, cached: int) -> tuple[Step, list[torch.Tensor]]:
    """A decode step of this library, and the buffers that it has to read."""
    attention = GroupQueryAttention(
        EMBED_DIM, NUM_HEADS, num_groups, True, True, bias=False, position=RotaryEmbedding(HEAD_DIM)
    ).eval()
    prompt = torch.randn(batch, cached, EMBED_DIM)
    attention(prompt)
    x = torch.randn(batch, 1, EMBED_DIM)
    weights = [parameter.detach() for parameter in attention.parameters()]
    return lambda: attention(x), [*attention.kv_cache.values(), *weights]


@torch.inference_mode()
def run(lengths: tuple[int, ...] = (128, 2048, 16384), rounds: int = 8) -> None:
    """Prints microseconds per step, the ratio to the best peer, and the share of plain reading."""
    body = []
    for cached in lengths:
        for num_groups in (16, 4, 1):
            step, buffers = ours(num_groups, 1, cached)
            seconds = medians(
                {
                    "ours": step,
                    "transformers": llama_decode(EMBED_DIM, NUM_HEADS, num_groups, 1, cached),
                    "x-transformers": x_transformers_decode(EMBED_DIM, NUM_HEADS, num_groups, 1, cached),
                    "reading": reading(*buffers),
                },
                rounds if cached > 1000 else 5 * rounds,
                f"decode step, {cached} cached, G {num_groups}",
            )
            own = seconds["ours"]
            body.append(
                [
                    f"{cached:,}",
                    str(num_groups),
                    *(microseconds(seconds[name]) for name in ("ours", "transformers", "x-transformers")),
                    f"{seconds['transformers'] / own:.2f}",
                    f"{seconds['x-transformers'] / own:.2f}",
                    f"{seconds['reading'] / own:.0%}",
                ]
            )
    print_table(
        f"One decode step, microseconds (E {EMBED_DIM}, H {NUM_HEADS}, D {HEAD_DIM}, batch 1, float32)",
        ["cached", "G", "ours", "transformers", "x-transformers", "x transformers", "x x-transformers", "of reading"],
        body,
    )
