"""Decode steps of transformers' own Llama over 8,192 tokens: their SDPA and cache, our kernel, our kernel and cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from transformer.engines import TransformersCache, register_attention
from transformer.engines.modeling import CACHE

from .timing import medians, microseconds, print_table

CACHED, LAYERS, WIDTH, HEADS, GROUPS, ROUNDS = 8192, 8, 512, 8, 2, 12


class Point(NamedTuple):
    """One model and batch."""

    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    batch: int = 1
    padding: int = 0
    """Columns of padding at the left of the first row."""


POINTS = (
    Point(),
    Point(head_dim=128),
    Point(batch=2, padding=100),
    Point(head_dim=128, batch=2, padding=100),
    Point(dtype=torch.bfloat16),
    Point(dtype=torch.bfloat16, head_dim=128),
)


@torch.inference_mode()
def run() -> None:
    """Prints microseconds per step, and how many times the steps with SDPA take as long as the other two."""
    register_attention()
    body = []
    for point in POINTS:
        steps = {
            "sdpa": _step(point, "sdpa", DynamicCache),
            "kernel": _step(point, "modular_attention", DynamicCache),
            "both": _step(point, "modular_attention", lambda config: TransformersCache(config)),
        }
        seconds = medians(steps, ROUNDS)
        name = f"{point.dtype}, D {point.head_dim}, B {point.batch}".removeprefix("torch.")
        ratios = [f"{seconds['sdpa'] / seconds[each]:.2f}" for each in ("kernel", "both")]
        body.append([name + (", padded" if point.padding else ""), *map(microseconds, seconds.values()), *ratios])
    print_table(
        f"One step of transformers' Llama of {LAYERS} layers after {CACHED} tokens (E {WIDTH}, H {HEADS}, G {GROUPS})",
        ["", "SDPA, us", "our kernel, us", "and our cache, us", "x kernel", "x both"],
        body,
    )


def _step(point: Point, attention: str, new_cache: Callable[..., Any]) -> Callable[[], Tensor]:
    """One token after a full cache, which is then rewound."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=WIDTH,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=point.head_dim,
        max_position_embeddings=2 * CACHED,
        attn_implementation=attention,
    )
    model, cache = LlamaForCausalLM(config).eval().to(point.dtype), new_cache(config=config)
    for layer in range(LAYERS):
        keys = torch.randn(point.batch, GROUPS, CACHED, point.head_dim, dtype=point.dtype)
        cache.update(keys, keys.flip(2), layer)
    token, mask = torch.randint(1024, (point.batch, 1)), None
    if point.padding:
        mask = torch.ones(point.batch, CACHED + 1, dtype=torch.long)
        mask[0, : point.padding] = 0

    def step() -> Tensor:
        logits: Tensor = model(token, attention_mask=mask, **{CACHE: cache}).logits
        cache.crop(-1)
        return logits

    return step
