"""Compositions that no known family describes, for `python -m benchmarks.engines`: saved, with their own tokens."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from transformer import GroupQueryAttention, MultiHeadAttention
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.checkpoints import save_model
from transformer.models import DecoderOnlyTransformer
from transformer.models.tokens import LanguageHead, TokenEmbedding
from transformer.positions import RotaryEmbedding

VOCABULARY, WIDTH, HEADS, LAYERS = 1000, 256, 8, 6
NEW_TOKENS = 24
ROUNDS = 5


def windows() -> DecoderOnlyTransformer:
    """Two key/value heads, norms of queries and keys and on both sides, and windows of 8, of 32 and of no tokens."""
    rotary = RotaryEmbedding(WIDTH // HEADS)
    blocks = [
        DecoderBlock(
            GroupQueryAttention(
                WIDTH, HEADS, 2, True, bias=False, position=rotary, window_size=window, qk_norm=RMSNorm
            ),
            GatedFeedForward(WIDTH, 2 * WIDTH),
            RMSNorm,
            placement="both",
        )
        for window in (8, 32, None) * (LAYERS // 3)
    ]
    embedding = TokenEmbedding(VOCABULARY, WIDTH, 2.0)
    head = LanguageHead(WIDTH, VOCABULARY, tied=embedding)
    return DecoderOnlyTransformer.from_parts(embedding, BlockStack(blocks, RMSNorm(WIDTH)), head)


def learned() -> DecoderOnlyTransformer:
    """Layer norms, plain networks with biases, learned positions, and one key/value head."""
    return DecoderOnlyTransformer(
        VOCABULARY,
        WIDTH,
        HEADS,
        4 * WIDTH,
        LAYERS,
        attention="mqa",
        attention_bias=True,
        position="learned",
        max_length=256,
        norm="layer",
        feed_forward="plain",
        feed_forward_bias=True,
        activation="gelu",
    )


def capped() -> DecoderOnlyTransformer:
    """Half of each head rotated, in interleaved pairs; scales and soft caps of scores and logits; an untied head."""
    norm = partial(RMSNorm, unit_offset=True)
    rotary = RotaryEmbedding(WIDTH // HEADS, rotary_dim=16, interleaved=True)
    blocks = [
        DecoderBlock(
            MultiHeadAttention(WIDTH, HEADS, True, bias=False, position=rotary, scale=0.25, softcap=10.0),
            GatedFeedForward(WIDTH, width, "gelu_tanh"),
            norm,
        )
        for width in (WIDTH, 2 * WIDTH) * (LAYERS // 2)
    ]
    embedding = TokenEmbedding(VOCABULARY, WIDTH)
    head = LanguageHead(WIDTH, VOCABULARY, scale=0.5, softcap=5.0)
    return DecoderOnlyTransformer.from_parts(embedding, BlockStack(blocks, norm(WIDTH)), head)


COMPOSITIONS: dict[str, Callable[[], DecoderOnlyTransformer]] = {
    "windows": windows,
    "learned": learned,
    "capped": capped,
}


def made(name: str) -> DecoderOnlyTransformer:
    """The composition with random weights, also of norms and biases, so that none of them can be left out unseen."""
    torch.manual_seed(0)
    model = COMPOSITIONS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def prompts() -> list[list[int]]:
    """Three prompts. The last two begin with the same tokens, and the longest is more than one chunk."""
    torch.manual_seed(1)
    first, second, third = (torch.randint(VOCABULARY, (length,)).tolist() for length in (9, 72, 150))
    return [first, second, second[:64] + third[64:]]


def own_tokens(model: DecoderOnlyTransformer) -> tuple[list[list[int]], float]:
    """The new tokens of our own `generate` for the padded prompts, and tokens per second on one core."""
    torch.set_num_threads(1)
    rows = prompts()
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    seconds = []
    for _ in range(1 + ROUNDS):
        begin = time.perf_counter()
        found = model.generate(ids, mask, max_new_tokens=NEW_TOKENS)[:, longest:]
        seconds.append(time.perf_counter() - begin)
    return found.tolist(), found.numel() / median(seconds[1:])


def save(name: str, folder: Path) -> None:
    """Writes the composition into the folder, and its own tokens beside it."""
    model = made(name)
    save_model(model, folder)
    model_type = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    if model_type != "modular_attention":
        raise SystemExit(f"{name}: expected a composition that no family describes, got model_type {model_type!r}")
    tokens, rate = own_tokens(model)
    (folder / "own.json").write_text(json.dumps({"tokens": tokens, "per_second": rate}), "utf-8")
