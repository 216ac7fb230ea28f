"""Decode steps, eager and compiled: time per step, and time of compiling."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer
from transformer.models import UMT5Config, UMT5Model

from .grid import FULL
from .models import SOURCE, decoder_only
from .runner import Timer
from .timing import microseconds, print_table

HELD, STEPS, ROOM = 64, 24, 192
"""Tokens before the steps, steps that are timed, and tokens that the cache has room for: a compiled step reads all."""


@torch.inference_mode()
def run() -> None:
    """Prints microseconds per step, eager and compiled, seconds of the first compiled step, and the graph count."""
    body = []
    for name, model, step in _models():
        tokens = torch.randint(2, 1000, (1, HELD + 2 * STEPS + 1))
        model.enable_cache(max_length=ROOM)
        step(tokens[:, :HELD])
        eager = _median(step, tokens[:, HELD : HELD + STEPS])
        model.kv_cache.truncate(HELD)
        model.kv_cache.freeze_layout()
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(step, fullgraph=True)
        warm_up = _median(compiled, tokens[:, HELD : HELD + 1])
        seconds = _median(compiled, tokens[:, HELD + 1 :])
        graphs = counters["stats"]["unique_graphs"]
        figures = microseconds(eager), microseconds(seconds), f"{eager / seconds:.2f}", f"{warm_up:.0f}", str(graphs)
        body.append([name, *figures])
    print_table(
        f"One decode step after {HELD} tokens, room for {ROOM} (batch 1, float32)",
        ["model", "eager, us", "compiled, us", "x eager", "first step, s", "graphs"],
        body,
    )


def _models() -> Iterator[tuple[str, Any, Callable[[Tensor], Tensor]]]:
    small, place = FULL.small, FULL.place()
    for shape in (small, FULL.llama):
        model: DecoderOnlyTransformer = decoder_only(shape, place)
        yield f"decoder-only, {shape.name}", model, model
    pair = EncoderDecoderTransformer(
        small.vocab_size, small.vocab_size, small.d_model, small.num_heads, small.d_ff, small.num_layers
    ).eval()
    umt5 = UMT5Model(UMT5Config.small()).eval().transformer
    for name, both in ((f"encoder-decoder, {small.name}", pair), ("UMT5-small", umt5)):
        memory = both.encode(torch.randint(2, 1000, (1, SOURCE)))
        yield name, both, lambda tokens, both=both, memory=memory: both.head(both.decode(tokens, memory))


def _median(step: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    """Seconds of a step of one token, each of `tokens` [1, L] in turn."""
    timer = Timer("cpu")
    return statistics.median(timer(partial(step, token)) for token in tokens.split(1, 1))
