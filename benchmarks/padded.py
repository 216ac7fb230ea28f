"""Padded batches: an encoder, a decoder's prefill, and training steps over rows of different lengths."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from . import ctranslate2_models, peer_models
from .case import Candidate, Case, Setup
from .grid import Grid
from .our_models import encoder, is_half
from .peers import WHOLE
from .saved import saved, with_weights
from .shapes import Rows
from .usage import next_token_loss, pair, trained

KIND = "Padded batches"
WORKS = "encoder", "prefill", "training step", "training step, encoder"
ALIKE = "ours, every row as long as the longest"
WEIGHT = 4


def cases(grid: Grid) -> Iterator[Case]:
    """All work with all batches."""
    for dtype in grid.dtypes:
        for rows in grid.padded:
            for work, build in BUILDS.items():
                point = {"work": work, "dtype": dtype, "rows": str(rows)}
                training = work.startswith("training")
                yield Case(KIND, point, partial(build, grid, dtype, rows), WEIGHT, training=training)


def states(grid: Grid, dtype: str, rows: Rows, **wanted: bool) -> Setup:
    """States of an encoder, padded on the right; those of CTranslate2 are handed over with `states=True` only."""
    ours, theirs = encoders(grid, dtype)
    ids, mask = batch(grid, rows, grid.encoder.vocab_size, left=False)
    theirs_mask = mask.long()
    peers = {WHOLE: Candidate(lambda: theirs(ids, attention_mask=theirs_mask))}
    if grid.on_cpu and not is_half(dtype):
        name, real = ctranslate2_models.FLOAT32, ctranslate2_models.real_ids(ids, mask)
        peers[name] = ctranslate2_models.encoding(_folder(grid), grid.encoder.vocab_size, name, real, **wanted)
    others = {ALIKE: Candidate(lambda: ours(ids))}
    return Setup(Candidate(lambda: ours(ids, mask)), peers, others, tokens=sum(rows.lengths()))


def prefill(grid: Grid, dtype: str, rows: Rows) -> Setup:
    """Logits of the last token of each prompt, padded on the left, as in the first step of a generation."""
    ours, theirs = pair(grid.place(dtype), grid.decoder)
    ids, mask = batch(grid, rows, grid.decoder.vocab_size, left=True)
    theirs_mask = mask.long()
    cache = ours.enable_cache().kv_cache
    return Setup(
        Candidate(lambda: [cache.clear(), ours(ids, mask, logits_to_keep=1)]),
        {WHOLE: Candidate(lambda: theirs(ids, attention_mask=theirs_mask, use_cache=True, logits_to_keep=1))},
        {ALIKE: Candidate(lambda: [cache.clear(), ours(ids, logits_to_keep=1)])},
        tokens=sum(rows.lengths()),
    )


def training(grid: Grid, dtype: str, rows: Rows) -> Setup:
    """A training step of a decoder, padded on the right; the loss is that of real tokens."""
    ours, theirs = pair(grid.place(dtype), grid.decoder)
    ids, mask = batch(grid, rows, grid.decoder.vocab_size, left=False)
    theirs_mask = mask.long()

    def their_loss() -> Tensor:
        return next_token_loss(theirs(ids, attention_mask=theirs_mask, use_cache=False).logits, ids, mask)

    return Setup(
        trained(ours, lambda: next_token_loss(ours(ids, mask), ids, mask)),
        {WHOLE: trained(theirs, their_loss)},
        tokens=sum(rows.lengths()),
    )


def training_encoder(grid: Grid, dtype: str, rows: Rows) -> Setup:
    """A training step of an encoder over the mean of the real tokens' states."""
    ours, theirs = encoders(grid, dtype)
    ids, mask = batch(grid, rows, grid.encoder.vocab_size, left=False)
    theirs_mask = mask.long()

    def loss(states: Tensor) -> Tensor:
        return states[mask].float().square().mean()

    return Setup(
        trained(ours, lambda: loss(ours(ids, mask))),
        {WHOLE: trained(theirs, lambda: loss(theirs(ids, attention_mask=theirs_mask).last_hidden_state))},
        tokens=sum(rows.lengths()),
    )


BUILDS = dict(zip(WORKS, (states, prefill, training, training_encoder), strict=True))


def encoders(grid: Grid, dtype: str) -> tuple[Any, Any]:
    """Our encoder and that of transformers, with the same weights, both without dropout."""
    place = grid.place(dtype)
    theirs = with_weights(peer_models.bert(grid.encoder, grid.place("float32")), _folder(grid), "bert.")
    return encoder(grid.encoder, place), place.module(theirs)


def _folder(grid: Grid):
    return saved(grid.encoder, partial(encoder, grid.encoder, grid.place("float32")))


def batch(grid: Grid, rows: Rows, vocab_size: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, L] and the mask of the real ones."""
    place = grid.place()
    return place.ids(vocab_size, rows.longest, rows.rows), place.mask(rows, left=left)
