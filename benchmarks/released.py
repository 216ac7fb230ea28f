"""Models that are released in bfloat16: generation with the shapes of Qwen3-0.6B and UMT5-small, 1 and 8 rows."""

from collections.abc import Iterator
from functools import partial

from . import ctranslate2_models, peer_models
from .case import Candidate, Case, Setup
from .grid import Grid
from .limits import arithmetic, reading
from .models import PROMPT, SINGLE, SOURCE
from .our_models import decoder_only, is_half, operations, umt5, weights_of_step
from .peers import DYNAMIC
from .saved import saved, with_weights

KIND = "Models released in bfloat16"


def cases(grid: Grid) -> Iterator[Case]:
    """bfloat16 beside our own float32, and float32 where others compute in it."""
    for rows in grid.rows:
        point = {"model": grid.qwen3.name, "dtype": "bfloat16", "rows": rows}
        yield Case(KIND, point, partial(text, grid, rows), 14)
    for dtype in grid.dtypes:
        for rows in grid.rows:
            point = {"model": grid.umt5.name, "dtype": dtype, "rows": rows}
            yield Case(KIND, point, partial(translation, grid, dtype, rows), 9)


def text(grid: Grid, rows: int) -> Setup:
    """Greedy generation after a short prompt."""
    shape, place, new = grid.qwen3, grid.place("bfloat16"), grid.few
    prompt = place.ids(shape.vocab_size, PROMPT, rows)
    half, single = decoder_only(shape, place), decoder_only(shape, grid.place("float32"))
    theirs = peer_models.llama(shape, place)
    return Setup(
        Candidate(lambda: half.generate(prompt, max_new_tokens=new)),
        {DYNAMIC: peer_models.writing(theirs, prompt, new)},
        {SINGLE: Candidate(lambda: single.generate(prompt, max_new_tokens=new))},
        limits=[
            reading(weights_of_step(half), times=new),
            arithmetic(operations(shape, rows * (PROMPT + new - 1)), place),
        ],
        tokens=new * rows,
    )


def translation(grid: Grid, dtype: str, rows: int) -> Setup:
    """Greedy generation, its source's encoding included."""
    shape, place, new = grid.umt5, grid.place(dtype), grid.generated
    source = place.ids(shape.vocab_size, SOURCE, rows)
    single = umt5(shape, grid.place("float32"))
    folder = saved(shape, lambda: single)
    model = umt5(shape, place)
    theirs = place.module(with_weights(peer_models.umt5(shape, grid.place("float32")), folder))
    peers, others = {DYNAMIC: peer_models.writing(theirs, source, new)}, {}
    if is_half(dtype):
        others[SINGLE] = Candidate(lambda: single.generate(source, max_new_tokens=new))
    elif grid.on_cpu:
        name = ctranslate2_models.FLOAT32
        peers[name] = ctranslate2_models.translating(folder, shape.vocab_size, name, source.tolist(), new)
    read = [*model.transformer.decoder.parameters(), *model.transformer.head.parameters()]
    return Setup(
        Candidate(lambda: model.generate(source, max_new_tokens=new)),
        peers,
        others,
        limits=[reading([each.detach() for each in read], times=new)],
        tokens=new * rows,
    )
