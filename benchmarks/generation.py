"""Generation with a small model, with caches and with a whole forward for each token."""

from collections.abc import Iterator
from functools import partial

from . import peer_models
from .case import Candidate, Case, Setup
from .grid import Grid
from .models import PROMPT, decoder_only

KIND = "Generation without caches"
WITH_CACHES = "ours, with caches"


def cases(grid: Grid) -> Iterator[Case]:
    """All numbers of new tokens."""
    for new in grid.new_tokens:
        yield Case(KIND, {"model": grid.small.name, "new tokens": new}, partial(setup, grid, new))


def setup(grid: Grid, new: int) -> Setup:
    """Both libraries compute the logits of the last position only."""
    place = grid.place()
    model, theirs = decoder_only(grid.small, place), peer_models.llama(grid.small, place)
    prompt = place.ids(grid.small.vocab_size, PROMPT)
    return Setup(
        Candidate(lambda: model.generate(prompt, max_new_tokens=new, use_cache=False)),
        {"transformers, no cache": peer_models.writing(theirs, prompt, new, use_cache=False)},
        {WITH_CACHES: Candidate(lambda: model.generate(prompt, max_new_tokens=new))},
        tokens=new,
    )
