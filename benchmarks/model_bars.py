"""Targets of whole models: one row in each dtype, released models, long prompts, padded batches, use, host time."""

from collections.abc import Sequence

from . import ctranslate2_models, host_time, long_prompt, models, padded, released, usage
from .bar import Bar, at, detail_bar, lead_bar, not_behind_bar, part_bar, ratio_bar, share_bar
from .grid import Grid
from .our_models import INT8
from .peers import DYNAMIC, WHOLE, X_TRANSFORMERS
from .runner import Measured
from .shapes import LLAMA_135M, QWEN3, UMT5_SMALL

BESIDE_THEIRS = "twice transformers' tokens per second"


def model_bars(results: Sequence[Measured]) -> list[Bar]:
    """All targets of whole models, in order."""
    return [
        *_llama(results),
        *_released(results),
        *_long_prompts(results),
        *_padded(results),
        *_usage(results),
        *_host_time(results),
    ]


def _of(results: Sequence[Measured], kind: str) -> list[Measured]:
    return [each for each in results if each.kind == kind]


def _llama(results: Sequence[Measured]) -> list[Bar]:
    points = at(_of(results, models.KIND), model=LLAMA_135M.name)
    texts = [each for each in points if "tokens after" in str(each.point["work"])]
    half, int8, single = (at(texts, dtype=dtype) for dtype in ("bfloat16", INT8, "float32"))
    steps = [each for each in points if each not in texts and each.share is not None]
    name = f"{LLAMA_135M.name}, one row"
    ct2_int8, ct2 = ctranslate2_models.INT8, ctranslate2_models.FLOAT32
    return [
        ratio_bar(f"{name}, bfloat16: 1.6 times our float32 before", half, models.BEFORE, 1.6),
        ratio_bar(f"{name}, bfloat16: 1.25 times our float32 of the same run", half, models.SINGLE, 1.25),
        ratio_bar(f"{name}, bfloat16: {BESIDE_THEIRS}", half, DYNAMIC, 2.0),
        ratio_bar(f"{name}, bfloat16: 1.3 times CTranslate2's float32", half, ct2, 1.3),
        ratio_bar(f"{name}, int8 weights: 2.2 times our float32 before", int8, models.BEFORE, 2.2),
        ratio_bar(f"{name}, int8 weights: 1.2 times CTranslate2's int8", int8, ct2_int8, 1.2),
        ratio_bar(f"{name}, float32: {BESIDE_THEIRS}", single, DYNAMIC, 2.0),
        not_behind_bar(f"{name}, float32: not behind CTranslate2", single, ct2),
        share_bar(f"{name}, float32: 75 % of reading its weights", single, 0.75),
        lead_bar(f"{name}, single steps, also compiled: {BESIDE_THEIRS}", steps, 2.0),
        share_bar(f"{name}, the same: 70 % of reading weights and cache", steps, 0.7),
    ]


def _released(results: Sequence[Measured]) -> list[Bar]:
    points = at(_of(results, released.KIND), dtype="bfloat16")
    qwen, umt5 = at(points, model=QWEN3.name), at(points, model=UMT5_SMALL.name)
    one = at(qwen, rows=1)
    eight = [each for each in qwen if each not in one]
    several = "8 rows of Qwen3, UMT5-small with 1 and 8, bfloat16"
    return [
        ratio_bar(f"{QWEN3.name}, bfloat16, one row: 1.9 times transformers' tokens per second", one, DYNAMIC, 1.9),
        share_bar(f"{QWEN3.name}, bfloat16, one row: 75 % of reading its weights", one, 0.75),
        part_bar(f"{several}: not slower than float32 (or level)", eight + umt5, released.SINGLE, 1.0, level=True),
        ratio_bar(f"{several}: {BESIDE_THEIRS}", eight + umt5, DYNAMIC, 2.0),
    ]


def _long_prompts(results: Sequence[Measured]) -> list[Bar]:
    points, (tokens, window) = _of(results, long_prompt.KIND), Grid.long_prompt
    asked, peak, cache = f"a prompt of {tokens:,} tokens, 135M", long_prompt.PEAK, long_prompt.CACHE
    return [
        detail_bar(f"{asked}: at most 750 MiB above the weights", at(points, window=0), peak, lambda _: 750.0),
        detail_bar(
            f"{asked}, over a window of {window:,}: at most its cache and 200 MiB",
            at(points, window=window),
            peak,
            lambda each: each.details[cache] + 200.0,
        ),
        part_bar(f"{asked}: not slower than one shot (or level)", points, long_prompt.ONE_SHOT, 1.0, level=True),
    ]


def _padded(results: Sequence[Measured]) -> list[Bar]:
    points = _of(results, padded.KIND)
    return [
        ratio_bar(f"padded batches, {work}: 1.5 times transformers", at(points, work=work), WHOLE, 1.5)
        for work in padded.WORKS
    ]


def _usage(results: Sequence[Measured]) -> list[Bar]:
    rivals = {"no other library ahead": None, "transformers not ahead": WHOLE}
    return [
        not_behind_bar(f"{kind}, {dtype}: {asked}", at(_of(results, kind), dtype=dtype), name)
        for kind in (usage.SMALL, usage.LARGE)
        for dtype in ("float32", "bfloat16")
        for asked, name in rivals.items()
    ]


def _host_time(results: Sequence[Measured]) -> list[Bar]:
    points = _of(results, host_time.KIND)
    return [
        ratio_bar(f"host time, one row, one thread: 1.3 times {name}", points, name, 1.3)
        for name in (DYNAMIC, X_TRANSFORMERS)
    ]
