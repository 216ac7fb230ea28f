"""Model composed of three kinds of layers: trained for some steps, then it generates text with its caches.

python examples/compose.py
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byte_text import read_bytes
from transformer import GroupQueryAttention, MultiQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, FeedForward, GatedFeedForward, RMSNorm
from transformer.positions import ALiBi, RotaryEmbedding

WIDTH, HEADS, PATTERN = 64, 4, "near far near full"
rotary = RotaryEmbedding(WIDTH // HEADS)


def near() -> DecoderBlock:
    """The last 8 bytes, about a word: one key/value head and a plain feed-forward network."""
    attention = MultiQueryAttention(WIDTH, HEADS, True, position=ALiBi(HEADS), window_size=8)
    return DecoderBlock(attention, FeedForward(WIDTH, 2 * WIDTH, "relu"), nn.LayerNorm)


def far() -> DecoderBlock:
    """The last 64 bytes, about a sentence: two key/value heads, norms before and after each branch."""
    attention = GroupQueryAttention(WIDTH, HEADS, 2, True, position=rotary, window_size=64, bias=False)
    return DecoderBlock(attention, GatedFeedForward(WIDTH, 2 * WIDTH), RMSNorm, placement="both")


def full() -> DecoderBlock:
    """All bytes from the first on, without positions: it selects by content alone."""
    attention = GroupQueryAttention(WIDTH, HEADS, 2, True, bias=False, qk_norm=RMSNorm)
    return DecoderBlock(attention, GatedFeedForward(WIDTH, 2 * WIDTH), RMSNorm)


class Composed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.stack = BlockStack.from_pattern(PATTERN, 4, RMSNorm(WIDTH), near=near, far=far, full=full)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes `[B, L]` to the logits of those that follow them, `[B, L, 256]`."""
        return self.head(self.stack(self.embedding(tokens)))


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
options = parser.parse_args()
torch.manual_seed(0)
model, (text, cut) = Composed(), read_bytes(None)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(1, options.steps + 1):
    rows = text[torch.randint(cut - 128, (16, 1)) + torch.arange(129)]
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 or step == options.steps:
        print(f"step {step:4}: {loss.item() / math.log(2):.2f} bits per byte", flush=True)

model.eval()
attentions = [block.attention for block in model.stack.blocks]
for attention in attentions:
    attention.use_kv_cache = True
written = unread = torch.tensor([list(b"The function ")])
with torch.inference_mode():
    for _ in range(200):
        logits = model(unread)[:, -1]  # the caches contain the earlier tokens
        unread = torch.multinomial((logits / 0.6).softmax(dim=-1), 1)
        written = torch.cat([written, unread], dim=1)
print(bytes(written[0].tolist()).decode("utf-8", "replace"))
held = ", ".join(map("{} {.kv_cache.cached_length}".format, PATTERN.split(), attentions))
print(f"\nShown: one model of three kinds of layers. After {written.shape[1] - 1} bytes their caches hold: {held}.")
