"""A model of one's own in an afternoon: three kinds of layers, mixed; trained for some steps, then writing.

python examples/compose.py
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from byte_text import read_bytes
from transformer import GroupQueryAttention, MultiQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, FeedForward, GatedFeedForward, RMSNorm
from transformer.positions import ALiBi, RotaryEmbedding

WIDTH, HEADS = 64, 4
NEAR, FAR = 8, 64  # windows, in tokens

rotary = RotaryEmbedding(WIDTH // HEADS)


def near() -> DecoderBlock:
    """Spells: one key/value head over the last few bytes, and a plain feed-forward."""
    attention = MultiQueryAttention(WIDTH, HEADS, True, position=ALiBi(HEADS), window_size=NEAR)
    return DecoderBlock(attention, FeedForward(WIDTH, 2 * WIDTH, "relu"), nn.LayerNorm)


def far() -> DecoderBlock:
    """Remembers a sentence: two groups over a wider window, normed on both sides of each branch."""
    attention = GroupQueryAttention(WIDTH, HEADS, 2, True, position=rotary, window_size=FAR, bias=False)
    return DecoderBlock(attention, GatedFeedForward(WIDTH, 2 * WIDTH), RMSNorm, placement="both")


def full() -> DecoderBlock:
    """Looks back to the first byte, without positions: it finds things by what they are."""
    attention = GroupQueryAttention(WIDTH, HEADS, 2, True, bias=False, qk_norm=RMSNorm)
    return DecoderBlock(attention, GatedFeedForward(WIDTH, 2 * WIDTH), RMSNorm)


class Composed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.stack = BlockStack.from_pattern("near far near full", 4, RMSNorm(WIDTH), near=near, far=far, full=full)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes `[B, L]` to the logits of those that follow them, `[B, L, 256]`."""
        return self.head(self.stack(self.embedding(tokens)))


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=400, help="of training (default: %(default)s)")
options = parser.parse_args()
torch.manual_seed(0)
model, (text, cut) = Composed(), read_bytes(None)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in trange(options.steps, desc="training"):
    rows = text[torch.randint(cut - 128, (16, 1)) + torch.arange(129)]
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"a loss of {loss.item():.2f} nats per byte after {options.steps} steps")

model.eval()
attentions = [block.attention for block in model.stack.blocks]
for attention in attentions:
    attention.use_kv_cache = True
written = unread = torch.tensor([list(b"The function ")])
with torch.inference_mode():
    for _ in range(200):
        logits = model(unread)[:, -1]  # the caches know what came before
        unread = torch.multinomial((logits / 0.6).softmax(dim=-1), 1)
        written = torch.cat([written, unread], dim=1)
print(bytes(written[0].tolist()).decode("utf-8", "replace"))
print("held after", written.shape[1] - 1, "bytes:", *(attention.kv_cache.held for attention in attentions))
