"""Encoder and decoder composed by hand: the decoder caches its own tokens and the projected source.

python examples/encoder_decoder.py
"""

import argparse

import torch
from torch import Tensor, nn

from transformer import GroupQueryAttention, MultiHeadAttention
from transformer.positions import RotaryEmbedding

WIDTH, HEADS, GROUPS, VOCABULARY, STEPS = 64, 4, 2, 100, 12


class Encoder(nn.Module):
    """Reads a whole sentence in one call: every token sees every other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(WIDTH, HEADS, position=RotaryEmbedding(WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class Decoder(nn.Module):
    """Generates token by token: attends to its own tokens, then to the source."""

    def __init__(self) -> None:
        super().__init__()
        self.written = GroupQueryAttention(WIDTH, HEADS, GROUPS, True, position=RotaryEmbedding(WIDTH // HEADS))
        self.source = GroupQueryAttention(WIDTH, HEADS, GROUPS)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        x = x + self.written(x)
        return self.head(x + self.source(x, kv=source))


@torch.inference_mode()
def write(source: Tensor, use_kv_cache: bool) -> list[int]:
    """The most likely tokens for a source `[1, S, E]`."""
    decoder.written.use_kv_cache = decoder.source.use_kv_cache = use_kv_cache
    decoder.written.kv_cache = None  # a new sentence; cross-attention itself detects a new source
    tokens = [0]
    for _ in range(STEPS):
        # The source is given at every step, but projected only if it differs from that of the step before.
        unread = tokens[-1:] if use_kv_cache else tokens
        logits = decoder(embedding(torch.tensor([unread])), source)
        if use_kv_cache and (not projections or projections[-1] is not decoder.source.kv_cache.source.key):
            projections.append(decoder.source.kv_cache.source.key)
        tokens.append(logits[0, -1].argmax().item())
    return tokens[1:]


def show(what: str, source: Tensor) -> list[int]:
    """Prints the decoder's tokens with its caches, and compares them with those without."""
    count = len(projections)
    cached = write(source, use_kv_cache=True)
    print(f"{what}, projected in {len(projections) - count} of {STEPS} steps:", *cached)
    if cached != write(source, use_kv_cache=False):
        raise SystemExit("without the caches the tokens differ")
    return cached


argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
torch.manual_seed(0)  # untrained: the tokens mean nothing, but with the caches and without they must be the same
embedding, encoder, decoder = nn.Embedding(VOCABULARY, WIDTH), Encoder(), Decoder()
projections: list[Tensor] = []  # the keys of the source, each time they were computed
with torch.inference_mode():
    source = encoder(embedding(torch.randint(VOCABULARY, (1, 7))))
    first, again = show("a new source", source), show("the same source", source)
    source[:, 3:] *= -1
    changed = show("changed in place", source)
if not first == again != changed:
    raise SystemExit("the tokens did not follow their source")
print("Shown: the tokens are the same with the caches and without, and the changed source was projected again.")
