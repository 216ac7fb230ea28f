"""Long document through one attention module, in chunks, over a window with sinks: constant memory and time.

python examples/long_document.py
"""

import argparse
import time
from pydoc_data.topics import topics

import torch
from torch import nn

from transformer import GroupQueryAttention
from transformer.kernels import warm_up
from transformer.positions import RotaryEmbedding

WIDTH, HEADS, GROUPS = 64, 4, 2
WINDOW, SINKS, CHUNK = 256, 4, 1000

torch.manual_seed(0)
document = torch.tensor(list("\n\n".join(topics.values()).encode()))
embedding = nn.Embedding(256, WIDTH)
attention = GroupQueryAttention(
    WIDTH,
    HEADS,
    GROUPS,
    apply_causal_mask=True,
    use_kv_cache=True,
    position=RotaryEmbedding(WIDTH // HEADS),
    window_size=WINDOW,  # each byte sees itself and the 255 before it,
    num_sinks=SINKS,  # and the first four of all: attention sinks (StreamingLLM, arXiv 2309.17453)
)
warm_up(attention)


@torch.inference_mode()
def read(start: int, stop: int) -> torch.Tensor:
    """The module's output `[1, L, E]` for a chunk of the document, after the chunks before it."""
    return attention(embedding(document[None, start:stop]))


def read_all() -> int:
    """Reads the document, prints tokens read and cached, bytes and time, and gives the bytes of the cache."""
    print(f"{len(document):,} bytes in chunks of {CHUNK:,}, over a window of {WINDOW} and {SINKS} sinks\n")
    print("      read    held    cache bytes    ms per chunk")
    sizes, times = set(), []
    for start in range(0, len(document), CHUNK):
        began = time.perf_counter()
        read(start, start + CHUNK)
        times.append((time.perf_counter() - began) * 1000)
        cache = attention.kv_cache
        sizes.add(cache.nbytes)
        if len(times) % 60 == 0:
            # The fastest of the last 60: the others waited for other programs.
            print(f"{cache.length:10,}{cache.cached_length:8,}{cache.nbytes:15,}{min(times[-60:]):16.2f}")
    if len(sizes) > 1:
        raise SystemExit(f"the cache's bytes did not stay constant: {sizes}")
    print("\nthe cache's bytes stayed constant")
    return sizes.pop()


def check_against_one_shot() -> None:
    """The output does not depend on how the text is cut: the last chunk equals a single call without a cache."""
    length = 4 * CHUNK
    attention.kv_cache = None
    for start in range(0, length, CHUNK):
        last = read(start, start + CHUNK)
    attention.use_kv_cache = False
    at_once = read(0, length)[:, -CHUNK:]
    difference = (last - at_once).abs().max().item()
    if difference > 1e-5:
        raise SystemExit(f"the last chunk is not what one shot gives: they differ by {difference:.0e}")
    print(f"the last chunk equals one shot without a cache: over {length:,} bytes they differ by {difference:.0e}")


argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
size = read_all()
check_against_one_shot()
print(f"Shown: a cache of {size:,} bytes serves {len(document):,} bytes of text, and the chunks change no output.")
