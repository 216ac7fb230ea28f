"""An encoder and a decoder composed by hand; the decoder remembers what it wrote, and the projected source.

python examples/encoder_decoder.py
"""

import torch
from torch import Tensor, nn

from transformer import GroupQueryAttention, MultiHeadAttention
from transformer.positions import RotaryEmbedding

WIDTH, HEADS, GROUPS, VOCABULARY, STEPS = 64, 4, 2, 100, 12


class Encoder(nn.Module):
    """Reads a whole sentence at once: every token sees every other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(WIDTH, HEADS, position=RotaryEmbedding(WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class Decoder(nn.Module):
    """Writes token by token: looks at what it wrote, then at the source."""

    def __init__(self) -> None:
        super().__init__()
        rotary = RotaryEmbedding(WIDTH // HEADS)
        self.written = GroupQueryAttention(WIDTH, HEADS, GROUPS, apply_causal_mask=True, position=rotary)
        self.source = GroupQueryAttention(WIDTH, HEADS, GROUPS)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        x = x + self.written(x)
        return self.head(x + self.source(x, kv=source))


@torch.inference_mode()
def write(source: Tensor, use_kv_cache: bool) -> list[int]:
    """The likeliest tokens for a source `[1, S, E]`."""
    decoder.written.use_kv_cache = decoder.source.use_kv_cache = use_kv_cache
    decoder.written.kv_cache = None  # a new sentence; whether the source is new, its module finds out itself
    tokens = [0]
    for _ in range(STEPS):
        # The source goes in at every step, but is projected only where it is not the one of the step before.
        unread = tokens[-1:] if use_kv_cache else tokens
        logits = decoder(embedding(torch.tensor([unread])), source)
        if use_kv_cache and (not projections or projections[-1] is not decoder.source.kv_cache.source.key):
            projections.append(decoder.source.kv_cache.source.key)
        tokens.append(logits[0, -1].argmax().item())
    return tokens[1:]


def show(what: str, source: Tensor) -> list[int]:
    """What the decoder writes with its caches, held against what it writes without."""
    count = len(projections)
    cached = write(source, use_kv_cache=True)
    print(f"{what}, projected in {len(projections) - count} of {STEPS} steps:", *cached)
    if cached != write(source, use_kv_cache=False):
        raise SystemExit("without the caches the decoder writes something else")
    return cached


# Untrained: what it writes means nothing, but with and without the caches it has to be the same.
torch.manual_seed(0)
embedding, encoder, decoder = nn.Embedding(VOCABULARY, WIDTH), Encoder(), Decoder()
projections: list[Tensor] = []  # the keys of the source, each time they were made anew
with torch.inference_mode():
    source = encoder(embedding(torch.randint(VOCABULARY, (1, 7))))
    first, again = show("a new source", source), show("the same source", source)
    source[:, 3:] *= -1
    changed = show("changed in place", source)
if not first == again != changed:
    raise SystemExit("the answer did not follow its source")
print("the same with the caches and without, and the changed source was noticed")
