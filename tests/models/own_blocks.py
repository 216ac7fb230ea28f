"""Models by parts for tests: blocks of a user, wrapped blocks, and modules of PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tests.models.variants import VOCAB
from tests.setups import fill
from transformer import MultiQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, FeedForward, GatedFeedForward, LayerNorm, RMSNorm
from transformer.cache import Step
from transformer.models import DecoderOnlyTransformer
from transformer.positions import ALiBi

WIDTH = 16


class Own(nn.Module):
    """A block of a user: attention and a feed-forward network side by side."""

    def __init__(self, window_size: int | None = None) -> None:
        super().__init__()
        self.norm = LayerNorm(WIDTH)
        self.attend = MultiQueryAttention(WIDTH, 4, True, position=ALiBi(4), window_size=window_size)
        self.feed_forward = FeedForward(WIDTH, 20)

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        normed = self.norm(x)
        return x + self.attend(normed, step=step) + self.feed_forward(normed)


class Wrapper(nn.Module):
    """A wrapper that hides the class and the attributes of a block."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: object, **keywords: object) -> Tensor:
        return self.inner(*arguments, **keywords)


def block(window_size: int | None = None) -> DecoderBlock:
    attention = MultiQueryAttention(WIDTH, 4, True, position=ALiBi(4), window_size=window_size)
    return DecoderBlock(attention, GatedFeedForward(WIDTH, 20), RMSNorm)


def mixed(tied: bool = True, positions: nn.Module | None = None) -> DecoderOnlyTransformer:
    """Three kinds of blocks, and modules of PyTorch at both ends."""
    embedding, head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
    if tied:
        head.weight = embedding.weight
    kinds: dict[str, Callable[[], nn.Module]] = {
        "own": lambda: Own(3),
        "wrapped": lambda: Wrapper(block()),
        "plain": lambda: block(4),
    }
    stack = BlockStack.from_pattern("own wrapped plain", 4, nn.LayerNorm(WIDTH), **kinds)
    model = DecoderOnlyTransformer.from_parts(embedding, stack, head, positions)
    fill(model, 0)
    return model.double().eval()
