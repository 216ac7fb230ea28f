"""Generation with whole models: a Llama of 135M in all dtypes, UMT5 without caches, and the digit reader."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from . import ctranslate2_models, peer_models
from .before import BeforeProcess
from .case import Candidate, Case, Setup, nothing
from .grid import Grid, Place
from .int8_weights import quantised
from .limits import arithmetic, reading
from .our_models import INT8, decoder_in, decoder_only, decoder_options, operations, umt5, weights, weights_of_step
from .peers import DYNAMIC, STATIC
from .saved import saved, with_weights

KIND = "Whole models"
PROMPT, SOURCE = 16, 64
DIGITS = Path(__file__).parent.parent / "examples" / "digits"
STEPS = 256
"""Room for compiled steps beside what is held."""

COMPILING = 12
"""The weight of what two compilers take."""

REREADING = "ours, no cache"
BEFORE, BEFORE_HALF = "ours before, float32", "ours before, bfloat16"
SINGLE, INT8_HALF = "ours, float32", "ours, int8 and bfloat16"
TORCHAO = "transformers, torchao int8"


def cases(grid: Grid) -> Iterator[Case]:
    """Texts, single steps, and translations without caches."""
    new, place = f"{grid.generated} tokens", grid.place()
    for dtype in (*grid.dtypes, INT8) if grid.on_cpu else grid.dtypes:
        yield _case(grid.llama.name, dtype, f"{new} after {PROMPT}", partial(text, grid, dtype), 14)
    for dtype in grid.dtypes:
        yield _case(grid.llama.name, dtype, f"1 token after {grid.held}", partial(one_step, grid, grid.place(dtype)), 4)
    if grid.compiler is not None:
        work = f"1 token after {grid.held}, compiled"
        build = partial(compiled_step, grid, place, grid.compiler)
        yield _case(grid.llama.name, grid.dtypes[0], work, build, COMPILING)
    yield _case(grid.umt5.name, grid.dtypes[0], f"{new} of {SOURCE}, no cache", partial(translation, grid, place), 5)
    if DIGITS.is_dir():
        yield _case("digit reader", grid.dtypes[0], f"a strip of {grid.generated}", partial(digits, grid, place), 2)


def _case(name: str, dtype: str, work: str, build: partial[Setup], weight: float) -> Case:
    return Case(KIND, {"model": name, "dtype": dtype, "work": work}, build, weight=weight)


def text(grid: Grid, dtype: str) -> Setup:
    """Greedy generation of one row, its short prompt included: all libraries with the same weights.

    Beside bfloat16 and int8 stand float32 of the same run, of CTranslate2 and of the earlier version.
    """
    new, shape = grid.generated, grid.llama
    prompt, model = grid.place().ids(shape.vocab_size, PROMPT), decoder_in(shape, grid, dtype)
    single = grid.place("float32")
    folder = saved(shape, partial(decoder_only, shape, single))
    theirs = with_weights(peer_models.llama(shape, single), folder)
    theirs = theirs.to(grid.place("bfloat16" if dtype == INT8 else dtype).dtype)
    rows = prompt.tolist()

    def ours(one) -> Candidate:
        return Candidate(lambda: one.generate(prompt, max_new_tokens=new))

    def converted(name: str) -> dict[str, Candidate]:
        return {name: ctranslate2_models.writing(folder, shape.vocab_size, name, rows, new)}

    peers, others = {}, {}
    if dtype == INT8:
        # Its int8 products are quicker in bfloat16.
        peers[TORCHAO] = peer_models.writing(quantised(theirs), prompt, new)
        peers |= converted(ctranslate2_models.INT8)
        others[INT8_HALF] = ours(quantised(decoder_only(shape, grid.place("bfloat16"))))
    else:
        peers[DYNAMIC] = peer_models.writing(theirs, prompt, new)
        peers[STATIC] = peer_models.writing(theirs, prompt, new, cache_implementation="static")
    if dtype == "float32":
        peers |= converted(ctranslate2_models.FLOAT32)
    elif grid.on_cpu:
        others |= converted(ctranslate2_models.FLOAT32) | {SINGLE: ours(decoder_only(shape, single))}
    earlier, close = before(grid, dtype, prompt, new)
    return Setup(
        ours(model),
        peers,
        others | earlier,
        limits=[
            reading(weights_of_step(model), times=new),
            arithmetic(operations(shape, PROMPT + new - 1), grid.place("float32" if dtype == INT8 else dtype)),
        ],
        tokens=new,
        close=close,
    )


def before(grid: Grid, dtype: str, prompt: torch.Tensor, new: int):
    """The same by the earlier version of `--before`, in float32 and in the dtype of the case; and what ends it."""
    if grid.before is None or not grid.on_cpu:
        return {}, nothing
    names = {BEFORE: torch.float32} | ({BEFORE_HALF: torch.bfloat16} if dtype == "bfloat16" else {})
    processes = {name: BeforeProcess(grid.before) for name in names}
    shape = decoder_options(grid.llama)
    candidates = {name: each.writing(*shape, names[name], prompt, new) for name, each in processes.items()}
    return candidates, lambda: [each.close() for each in processes.values()]


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
        limits=[reading([*weights(model), *held])],
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
        limits=[reading([*weights(model), *held])],
    )


def translation(grid: Grid, place: Place) -> Setup:
    """Greedy generation without caches, its source's encoding included."""
    model, theirs = umt5(grid.umt5, place), peer_models.umt5(grid.umt5, place)
    source, new = place.ids(grid.umt5.vocab_size, SOURCE), grid.generated
    return Setup(
        Candidate(lambda: model.generate(source, max_new_tokens=new, use_cache=False)),
        {"transformers, no cache": peer_models.writing(theirs, source, new, use_cache=False)},
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
