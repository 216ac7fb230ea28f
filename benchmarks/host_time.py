"""Time of the host: decode steps of models so small that Python and the start of operations take nearly all of it."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor
from x_transformers import Decoder, TransformerWrapper

from . import peer_models
from .case import Candidate, Case, Setup
from .grid import Grid, Place
from .our_models import decoder_only
from .peers import DYNAMIC, X_TRANSFORMERS
from .shapes import Model

KIND = "Host time of a decode step"
HELD = 64


def cases(grid: Grid) -> Iterator[Case]:
    """One row, one thread."""
    for shape, dtype in product(grid.host_bound, grid.dtypes):
        yield Case(KIND, {"model": shape.name, "dtype": dtype}, partial(setup, grid.place(dtype), shape), 5, threads=1)


def setup(place: Place, shape: Model) -> Setup:
    """The logits of one more token, with each library's own cache."""
    model, theirs = decoder_only(shape, place), peer_models.llama(shape, place)
    prompt, token = place.ids(shape.vocab_size, HELD), place.ids(shape.vocab_size, 1)
    cache = model.enable_cache().kv_cache
    with torch.inference_mode():
        model.states(prompt)
    return Setup(
        Candidate(lambda: model(token), lambda: cache.truncate(HELD), cache.nbytes),
        {DYNAMIC: peer_models.step(theirs, prompt, token), X_TRANSFORMERS: x_transformers_step(place, shape, prompt)},
    )


def x_transformers_step(place: Place, shape: Model, prompt: Tensor) -> Candidate:
    """The same with x-transformers: rotary embeddings, RMS norms, gated feed-forward networks, flash attention."""
    layers = Decoder(
        dim=shape.d_model,
        depth=shape.num_layers,
        heads=shape.num_heads,
        attn_kv_heads=shape.num_groups,
        attn_dim_head=shape.d_model // shape.num_heads,
        attn_flash=True,
        rotary_pos_emb=True,
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        ff_mult=shape.d_ff / shape.d_model,
    )
    options = {"max_seq_len": 1 << 14, "use_abs_pos_emb": False, "tie_embedding": True, "input_not_include_cache": True}
    model = place.module(TransformerWrapper(num_tokens=shape.vocab_size, attn_layers=layers, **options))
    with torch.inference_mode():
        _, start = model(prompt, return_intermediates=True)
    state, token = start, prompt[:, :1]

    def run() -> Tensor:
        nonlocal state
        logits, state = model(token, cache=state, return_intermediates=True)
        result: Tensor = logits
        return result

    def rewind() -> None:
        nonlocal state
        state = start

    return Candidate(run, rewind)
