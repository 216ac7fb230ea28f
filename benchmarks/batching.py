"""Requests in a running batch, beside one after the other; and turns of a chat whose prefixes are known."""

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from transformer import Batch, DecoderOnlyTransformer, PrefixCache

from . import peer_models
from .case import Candidate, Case, Setup
from .grid import Grid
from .our_models import decoder_only
from .shapes import Model

KIND, CHAT = "Requests in a running batch", "A chat whose prefixes are known"
ONE_BY_ONE, PAGED, WHOLE_PROMPTS = "ours, one after the other", "transformers, generate_batch", "ours, whole prompts"
SAVED = "part of the prompts' tokens that were saved"
REQUESTS, ROWS = 24, 8
SYSTEM, TURNS, TURN = 256, 8, 32
"""Tokens of the system prompt, turns of a chat, and tokens of a turn."""
ANSWER = 16
MANY_BYTES = 1 << 34

Requests = list[tuple[list[int], int]]
"""Prompts, and how many new tokens each asks for."""


def cases(grid: Grid) -> Iterator[Case]:
    """Two models; requests of equal numbers of new tokens, and of different ones, which leave at different times."""
    for model, weight in ((grid.decoder, 4.0), (grid.llama, 30.0)):
        for varied in (False, True):
            point = {"model": model.name, "new tokens": "8 to 56" if varied else "32"}
            yield Case(KIND, point, partial(requests_setup, grid, model, varied), weight)
        point = {"model": model.name, "turns": TURNS}
        yield Case(CHAT, point, partial(chat_setup, grid, model), weight)


def requests_setup(grid: Grid, model: Model, varied: bool) -> Setup:
    """All requests are there at the beginning, and wait for a row; prompts have 8 to 64 tokens."""
    place, pick = grid.place(), Random(0)
    lengths = [pick.randint(8, 64) for _ in range(REQUESTS)]
    prompts = [place.ids(model.vocab_size, length)[0].tolist() for length in lengths]
    requests = [(prompt, pick.randint(8, 56) if varied else 32) for prompt in prompts]
    ours = decoder_only(model, place)
    peers = {} if varied else {PAGED: paged(peer_models.llama(model, place), prompts, 32)}
    return Setup(
        Candidate(lambda: together(ours, requests)),
        peers,
        {ONE_BY_ONE: Candidate(lambda: one_by_one(ours, requests, place.device))},
        tokens=sum(new for _, new in requests),
    )


def together(model: DecoderOnlyTransformer, requests: Requests) -> None:
    """All requests in a batch of at most ROWS rows."""
    batch = Batch(model, max_rows=ROWS)
    for prompt, new in requests:
        batch.add(prompt, max_new_tokens=new)
    while len(batch):
        batch.step()


def one_by_one(model: DecoderOnlyTransformer, requests: Requests, device: str) -> None:
    """Each request alone."""
    for prompt, new in requests:
        model.generate(torch.tensor([prompt], device=device), max_new_tokens=new)


def paged(model: Any, prompts: list[list[int]], new: int) -> Candidate:
    """transformers' continuous batching over a paged cache, of which a thread is started once."""
    options = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=1024, max_requests_per_batch=ROWS)

    def run() -> None:
        given = {"continuous_batching_config": pages, "persistent_manager": True, "warmup": False}
        model.generate_batch(prompts, generation_config=options, **given)

    return Candidate(run)


def chat_setup(grid: Grid, model: Model) -> Setup:
    """A system prompt, and turns that each have all the earlier ones before them."""
    place, ours = grid.place(), decoder_only(model, grid.place())
    system = place.ids(model.vocab_size, SYSTEM)
    turns = [place.ids(model.vocab_size, TURN) for _ in range(TURNS)]
    saved: dict[str, float] = {}

    def chat(known: bool) -> None:
        prefixes, so_far, read = PrefixCache(ours, MANY_BYTES), system, 0
        for turn in turns:
            so_far = torch.cat((so_far, turn), 1)
            read += so_far.shape[1]
            so_far = (prefixes if known else ours).generate(so_far, max_new_tokens=ANSWER)
        if known:
            saved[SAVED] = prefixes.tokens_saved / read

    return Setup(
        Candidate(lambda: chat(True)),
        others={WHOLE_PROMPTS: Candidate(lambda: chat(False))},
        tokens=TURNS * ANSWER,
        details=lambda: saved,
    )
