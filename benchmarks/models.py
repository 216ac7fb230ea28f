"""Generation with whole models: shapes of Llama and UMT5, and the digit reader of the examples."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer

from . import peer_models
from .case import Candidate, Case, Setup
from .grid import Grid, Model, Place, SourceModel
from .limits import reading
from .peers import DYNAMIC, STATIC

KIND = "Whole models"
PROMPT, SOURCE = 16, 64
DIGITS = Path(__file__).parent.parent / "examples" / "digits"
STEPS = 256
"""Room for compiled steps beside what is held."""

COMPILING = 24
"""The weight of what two compilers take."""

REREADING = "ours, no cache"


def cases(grid: Grid) -> Iterator[Case]:
    """Texts, single steps, and translations with caches and without."""
    new, place = f"{grid.generated} tokens", grid.place()
    yield _case(grid.llama.name, f"{new} after {PROMPT}", partial(text, grid, place))
    yield _case(grid.llama.name, f"1 token after {grid.held}", partial(one_step, grid, place))
    if grid.compiler is not None:
        work = f"1 token after {grid.held}, compiled"
        yield _case(grid.llama.name, work, partial(compiled_step, grid, place, grid.compiler), COMPILING)
    yield _case(grid.umt5.name, f"{new} of {SOURCE}", partial(translation, grid, place, True))
    yield _case(grid.umt5.name, f"{new} of {SOURCE}, no cache", partial(translation, grid, place, False))
    if DIGITS.is_dir():
        yield _case("digit reader", f"a strip of {grid.generated}", partial(digits, grid, place))


def _case(name: str, work: str, build: partial[Setup], weight: float = 2) -> Case:
    return Case(KIND, {"model": name, "work": work}, build, weight=weight)


def decoder_only(model: Model, place: Place) -> DecoderOnlyTransformer:
    """A decoder-only model of this shape."""
    return place.module(
        DecoderOnlyTransformer(
            model.vocab_size,
            model.d_model,
            model.num_heads,
            model.d_ff,
            model.num_layers,
            attention="gqa",
            num_groups=model.num_groups,
        )
    )


def text(grid: Grid, place: Place) -> Setup:
    """Greedy generation, its short prompt included."""
    model, theirs = decoder_only(grid.llama, place), peer_models.llama(grid.llama, place)
    prompt, new = place.ids(grid.llama.vocab_size, PROMPT), grid.generated
    return Setup(
        Candidate(lambda: model.generate(prompt, max_new_tokens=new)),
        {
            DYNAMIC: peer_models.writing(theirs, prompt, new),
            STATIC: peer_models.writing(theirs, prompt, new, cache_implementation="static"),
        },
        limit=reading(weights(model), times=new),
        tokens=new,
    )


def one_step(grid: Grid, place: Place) -> Setup:
    """The logits of one more token after a longer text."""
    model, theirs = decoder_only(grid.llama, place), peer_models.llama(grid.llama, place)
    prompt, token = place.ids(grid.llama.vocab_size, grid.held), place.ids(grid.llama.vocab_size, 1)
    cache = model.enable_cache().kv_cache
    with torch.inference_mode():
        model.states(prompt)
    held = [tensor for block in model.decoder_blocks() for tensor in block.attention.kv_cache.values()]
    return Setup(
        Candidate(lambda: model(token), lambda: cache.truncate(grid.held), cache.nbytes),
        {DYNAMIC: peer_models.step(theirs, prompt, token)},
        limit=reading([*weights(model), *held]),
    )


def compiled_step(grid: Grid, place: Place, compiler: str) -> Setup:
    """The same as one compiled graph over a frozen layout (on a GPU a CUDA graph); both sides read the whole buffers.

    No candidate rewinds, because the buffers have room for all steps of a case.
    """
    model, theirs = decoder_only(grid.llama, place), peer_models.llama(grid.llama, place)
    prompt, token = place.ids(grid.llama.vocab_size, grid.held), place.ids(grid.llama.vocab_size, 1)
    room = grid.held + STEPS
    cache = model.enable_cache(max_length=room).kv_cache
    with torch.inference_mode():
        model.states(prompt)
    nbytes = cache.nbytes
    cache.freeze_layout()
    step = peer_models.compiled(model, compiler)
    with torch.inference_mode():
        peer_models.warm(lambda: step(token))
    held = [tensor for block in model.decoder_blocks() for tensor in block.attention.kv_cache.values()]
    return Setup(
        Candidate(lambda: step(token), held=nbytes),
        {
            DYNAMIC: peer_models.step(theirs, prompt, token),
            f"{STATIC}, compiled": peer_models.compiled_step(theirs, prompt, token, room, compiler),
        },
        limit=reading([*weights(model), *held]),
    )


def encoder_decoder(model: SourceModel, place: Place) -> EncoderDecoderTransformer:
    """A model of UMT5's shape: a relative bias in each layer, tied embeddings, and unscaled scores."""
    return place.module(
        EncoderDecoderTransformer(
            model.vocab_size,
            model.vocab_size,
            model.d_model,
            model.num_heads,
            model.d_ff,
            model.num_layers,
            head_dim=model.head_dim,
            position="relative",
            relative_per_layer=True,
            activation="gelu_tanh",
            scale=1.0,
            shared_embeddings=True,
            logit_scale=model.d_model**-0.5,
        )
    )


def translation(grid: Grid, place: Place, use_cache: bool) -> Setup:
    """Greedy generation, its source's encoding included."""
    model, theirs = encoder_decoder(grid.umt5, place), peer_models.umt5(grid.umt5, place)
    source, new = place.ids(grid.umt5.vocab_size, SOURCE), grid.generated
    name = DYNAMIC if use_cache else "transformers, no cache"
    return Setup(
        Candidate(lambda: model.generate(source, max_new_tokens=new, use_cache=use_cache)),
        {name: peer_models.writing(theirs, source, new, use_cache=use_cache)},
        limit=reading([*weights(model.decoder), model.head.proj.weight.detach()], times=new) if use_cache else None,
        tokens=new,
    )


def digits(grid: Grid, place: Place) -> Setup:
    """The digit reader of the examples, untrained: its time does not depend on its input."""
    if str(DIGITS) not in sys.path:
        sys.path.insert(0, str(DIGITS))
    from model import DigitReader, Size

    cell, new = 28, grid.generated
    reader = place.module(DigitReader(Size(cell)))
    images = torch.rand(1, cell, new * cell, device=place.device, dtype=place.dtype)
    return Setup(
        Candidate(lambda: reader.read(images, stop_tokens=())),
        others={REREADING: Candidate(lambda: reader.read(images, use_kv_cache=False, stop_tokens=()))},
        tokens=new + 1,
    )


def weights(module: nn.Module) -> list[Tensor]:
    """All parameters, each once."""
    return [parameter.detach() for parameter in module.parameters()]
