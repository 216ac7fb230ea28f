"""Whole models as people run them: forward, generation in five ways, and a training step; two models."""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ctranslate2_models, peer_models
from .case import Candidate, Case, Setup
from .grid import Grid, Place
from .our_models import decoder_only, is_half
from .peers import WHOLE
from .saved import saved, with_weights
from .shapes import Model, Rows

SMALL, LARGE = "Whole models in use, small", "Whole models in use, 135M"
PROMPT = 16
LARGE_WEIGHT = 3.5
"""Weight of a case of the larger model, whose calls take seconds."""


class Way(NamedTuple):
    """A way of generating: rows of the prompt, and the options of each library where it is not greedy."""

    rows: int
    ours: Mapping[str, Any] = MappingProxyType({})
    theirs: Mapping[str, Any] = MappingProxyType({})
    converted: Mapping[str, Any] = MappingProxyType({})
    padded: bool = False


def ways(grid: Grid) -> dict[str, Way]:
    """All ways, by name."""
    sampled = {"do_sample": True, "top_p": 0.9, "top_k": 0}
    return {
        "greedy": Way(1),
        "top-p": Way(
            1, {"temperature": 1.0, "top_p": 0.9}, sampled, {"sampling_topk": 0, "sampling_topp": 0.9, "beam_size": 1}
        ),
        "4 beams of 2 rows": Way(2, {"num_beams": 4}, {"num_beams": 4}, {"beam_size": 4}),
        f"{grid.batch} rows": Way(grid.batch),
        f"{grid.batch} padded rows": Way(grid.batch, padded=True),
    }


def small_cases(grid: Grid) -> Iterator[Case]:
    """The model of 8 layers of 256."""
    yield from cases(grid, SMALL, grid.decoder, grid.generated, 2)


def large_cases(grid: Grid) -> Iterator[Case]:
    """The Llama of 135M."""
    yield from cases(grid, LARGE, grid.llama, grid.few, LARGE_WEIGHT)


def cases(grid: Grid, kind: str, shape: Model, new: int, weight: float) -> Iterator[Case]:
    """All work with one model in all dtypes."""
    for dtype in grid.dtypes:
        for rows, length in grid.forward:
            build = partial(forward, grid, dtype, shape, rows, length)
            yield Case(kind, _point(shape, dtype, f"forward {rows} x {length}"), build, weight)
        for name, way in ways(grid).items():
            build = partial(generation, grid, dtype, shape, way, new)
            yield Case(kind, _point(shape, dtype, f"{new} tokens, {name}"), build, weight)
        rows, length = grid.trained
        build = partial(training, grid, dtype, shape, rows, length)
        yield Case(kind, _point(shape, dtype, f"training step {rows} x {length}"), build, weight, training=True)


def _point(shape: Model, dtype: str, work: str) -> dict[str, str]:
    return {"model": shape.name, "dtype": dtype, "work": work}


def pair(place: Place, shape: Model) -> tuple[Any, Any]:
    """Our model and that of transformers, with the same weights."""
    theirs = with_weights(peer_models.llama(shape, Place()), folder_of(shape))
    return decoder_only(shape, place), place.module(theirs)


kept_pair = lru_cache(1)(pair)
"""The same for case after case, where no case changes the models."""


def folder_of(shape: Model) -> Path:
    """The folder with the weights of both."""
    return saved(shape, partial(decoder_only, shape, Place()))


def forward(grid: Grid, dtype: str, shape: Model, rows: int, length: int) -> Setup:
    """Logits of all positions, without caches."""
    ours, theirs = kept_pair(grid.place(dtype), shape)
    ids = grid.place().ids(shape.vocab_size, length, rows)
    return Setup(
        Candidate(lambda: ours(ids)), {WHOLE: Candidate(lambda: theirs(ids, use_cache=False))}, tokens=rows * length
    )


def generation(grid: Grid, dtype: str, shape: Model, way: Way, new: int) -> Setup:
    """New tokens after a short prompt, padded on the left where rows differ."""
    ours, theirs = kept_pair(grid.place(dtype), shape)
    place = grid.place()
    ids, mask = place.ids(shape.vocab_size, PROMPT, way.rows), None
    if way.padded:
        mask = place.mask(Rows(way.rows, PROMPT // 4, PROMPT), left=True)
    peers = {WHOLE: peer_models.writing(theirs, ids, new, attention_mask=given(mask, ids), **way.theirs)}
    if grid.on_cpu and not is_half(dtype):
        name, prompts = ctranslate2_models.FLOAT32, ctranslate2_models.real_ids(ids, mask)
        peers[name] = ctranslate2_models.writing(
            folder_of(shape), shape.vocab_size, name, prompts, new, **way.converted
        )
    return Setup(
        Candidate(lambda: ours.generate(ids, mask, max_new_tokens=new, **way.ours)), peers, tokens=new * way.rows
    )


def given(mask: Tensor | None, ids: Tensor) -> Tensor:
    """The mask as transformers takes it; without one it would warn."""
    return torch.ones_like(ids) if mask is None else mask.long()


def training(grid: Grid, dtype: str, shape: Model, rows: int, length: int) -> Setup:
    """Forward, the loss of the next token, backward, and a step of AdamW."""
    ours, theirs = pair(grid.place(dtype), shape)
    ids = grid.place().ids(shape.vocab_size, length, rows)
    return Setup(
        trained(ours, lambda: next_token_loss(ours(ids), ids)),
        {WHOLE: trained(theirs, lambda: next_token_loss(theirs(ids, use_cache=False).logits, ids))},
        tokens=rows * length,
    )


def trained(model: nn.Module, loss: Callable[[], Tensor]) -> Candidate:
    """A step of training."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return Candidate(run)


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross entropy of each next token, padding left out."""
    predicted, following = logits[:, :-1], ids[:, 1:]
    if mask is None:
        return F.cross_entropy(predicted.flatten(0, 1).float(), following.flatten())
    counted = mask[:, 1:] & mask[:, :-1]
    return F.cross_entropy(predicted[counted].float(), following[counted])
