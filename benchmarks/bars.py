"""Targets of speed and memory, compared with measurements; those of whole models stand in `model_bars`."""

from collections.abc import Sequence
from itertools import product

from . import (
    batching,
    chunks,
    coded_keys,
    decode_step,
    exactness,
    importing,
    prefill,
    shared_prefix,
    speculative,
    stored_caches,
    streaming,
    tensor_parallel,
    training,
    windowed_prefill,
)
from .bar import Bar, at, detail_bar, not_behind_bar, part_bar, peer_is_ahead, ratio_bar, share_bar, where
from .layers import SDPA
from .model_bars import model_bars
from .peers import DYNAMIC, TORCH, WHOLE
from .runner import OURS, Measured

__all__ = ["Bar", "all_bars", "peer_is_ahead"]

LINEAR = 1.15
"""Time per pair of query and key may grow so much from the shortest prompt to the longest."""

FLAT = 0.9
"""A module at its start may take no less than this part of the time of one that has come far."""

FLAT_MEMORY = 64
"""Megabytes that the process may gain from the first mark to the last."""

SLACK = 0.02
"""Seconds by which the import may seem slower than that of the earlier version."""

FLOAT32_ERROR, INT8_ERROR = 1e-6, 1e-6
"""Largest errors, as parts of the largest value: rounding of float32 over some 1,000 products."""


def all_bars(results: Sequence[Measured]) -> list[Bar]:
    """All targets, in order."""
    return [
        not_behind_bar("no peer ahead at any point (within 3 %, or with intervals that overlap, is level)", results),
        *model_bars(results),
        *_decode(results),
        *_shared(results),
        *_batching(results),
        *_parallel(results),
        *_speculative(results),
        *_exactness(results),
        *_kernels(results),
        *_windowed(results),
        *_streaming(results),
        *_training(results),
        *_import(results),
    ]


def _decode(results: Sequence[Measured]) -> list[Bar]:
    points = [each for each in results if each.kind == decode_step.KIND]
    single, half = at(points, dtype="float32"), at(points, dtype="bfloat16")
    bars = []
    for groups, times in ((16, 5.0), (4, 4.0), (1, 2.5)):
        here = at(single, cached=16384, batch=1, G=groups)
        asked = f"a float32 decode step over 16,384 tokens, G {groups}: {times:g} times DynamicCache's speed"
        bars.append(ratio_bar(asked, here, DYNAMIC, times))
    for groups, part in ((16, 0.75), (4, 0.55), (1, 0.45)):
        asked = f"the same from 2,048 tokens on, 1 and 8 rows, G {groups}: {part:.0%} of the limit"
        bars.append(share_bar(asked, _from(at(single, G=groups), 2048), part))
    beside = decode_step.SINGLE
    for groups, part in ((16, 0.6), (4, 0.85)):
        asked = f"a bfloat16 decode step from 4,096 tokens on, G {groups}: at most {part:g} of float32's time"
        bars.append(part_bar(asked, _from(at(half, G=groups), 4096), beside, part))
    asked = "a bfloat16 decode step not slower than float32 at any point (level as above)"
    bars.append(part_bar(asked, half, beside, 1.0, level=True))
    int8 = at([each for each in results if each.kind == coded_keys.KIND], codec="int8")
    for groups, cached, part in ((16, 4096, 0.5), (4, 4096, 0.8), (4, 16384, 0.6)):
        asked = f"the kernel over int8 keys from {cached:,} tokens on, G {groups}: at most {part:g} of float32's time"
        bars.append(part_bar(asked, _from(at(int8, G=groups), cached), coded_keys.SINGLE, part))
    return [*bars, *_stored(results)]


def _stored(results: Sequence[Measured]) -> list[Bar]:
    """Whole models over caches in fewer bits."""
    points = [each for each in results if each.kind == stored_caches.KIND]
    int8 = _from(at(points, codec="int8"), 16384)
    asked = "a step of a model over an int8 cache from 16,384 tokens on: at most 0.6 of float32's time"
    theirs = "a step over an int8 or int4 cache: 3 times transformers' quantised cache of 4 bits"
    return [
        part_bar(asked, int8, stored_caches.SINGLE, 0.6),
        ratio_bar(theirs, points, stored_caches.QUANTIZED, 3.0),
    ]


def _shared(results: Sequence[Measured]) -> list[Bar]:
    points = at([each for each in results if each.kind == shared_prefix.KIND], rows=16, shared=8192)
    single, asked = at(points, dtype="float32"), "16 rows after 8,192 shared tokens"
    bars = []
    # Of one key/value head arithmetic takes the time, shared or not.
    for dtype, groups in product(("float32", "bfloat16"), (16, 4)):
        third = f"{asked}, {dtype}, G {groups}: at most a third of the time of {shared_prefix.APART}"
        bars.append(part_bar(third, at(points, dtype=dtype, G=groups), shared_prefix.APART, 1 / 3))
    return [
        *bars,
        detail_bar(f"{asked}: at most a tenth of the bytes", points, shared_prefix.BYTES, lambda _: 0.1),
        detail_bar(f"{asked}: equal to 1e-6", single, shared_prefix.ERROR, lambda _: FLOAT32_ERROR),
    ]


def _batching(results: Sequence[Measured]) -> list[Bar]:
    requests, chats = ([each for each in results if each.kind == kind] for kind in (batching.KIND, batching.CHAT))
    return [
        part_bar(
            "requests in a batch of 8: at most half of the time of one after the other",
            requests,
            batching.ONE_BY_ONE,
            0.5,
        ),
        part_bar("a chat whose prefixes are known: at most 0.9 of the time", chats, batching.WHOLE_PROMPTS, 0.9),
    ]


def _from(points: Sequence[Measured], cached: int) -> list[Measured]:
    return [each for each in points if int(each.point["cached"]) >= cached]


def _exactness(results: Sequence[Measured]) -> list[Bar]:
    points = [each for each in results if each.kind == exactness.KIND]
    half = [each for each in points if exactness.OF_SDPA in each.details]
    return [
        detail_bar(
            "float32 within 1e-6 of the largest value",
            at(points, dtype="float32"),
            exactness.ERROR,
            lambda _: FLOAT32_ERROR,
        ),
        detail_bar(
            "16 bits within twice the error of SDPA",
            half,
            exactness.ERROR,
            lambda each: 2 * each.details[exactness.OF_SDPA],
        ),
        detail_bar(
            "int8 weights equal to the numbers that they stand for, within rounding of float32",
            at(points, dtype=exactness.INT8),
            exactness.ERROR,
            lambda _: INT8_ERROR,
        ),
    ]


def _kernels(results: Sequence[Measured]) -> list[Bar]:
    chunk = at([each for each in results if each.kind == chunks.KIND], cached=16384, new=256)
    whole = [each for each in results if each.kind == prefill.KIND]
    return [
        ratio_bar("a chunk of 256 on 16,384: within 1.15 of SDPA without a cache", chunk, SDPA, 1 / 1.15),
        ratio_bar("prefill: within 1.05 of SDPA and its projections", whole, SDPA, 1 / 1.05),
    ]


def _windowed(results: Sequence[Measured]) -> list[Bar]:
    points = at([each for each in results if each.kind == windowed_prefill.KERNEL], window=1024)
    asked = "windowed prefill of 16,384 over 1,024: the kernel 8 times SDPA's speed with its mask"
    bars = [ratio_bar(asked, at(points, tokens=16384), windowed_prefill.MASKED, 8.0)]
    asked = f"the same: linear in the length (time per pair of query and key grows less than {LINEAR} times)"
    if len(points) < 2:
        return [*bars, Bar(asked, None, "")]
    costs = [_per_pair(each) for each in points]
    growth = costs[-1] / costs[0]
    figures = f"{growth:.2f} from {points[0].point['tokens']:,} to {points[-1].point['tokens']:,} tokens"
    return [*bars, Bar(asked, growth <= LINEAR, figures)]


def _per_pair(measured: Measured) -> float:
    pairs = windowed_prefill.pairs(int(measured.point["window"]), int(measured.point["tokens"]))
    return measured.seconds[OURS].median / pairs


def _speculative(results: Sequence[Measured]) -> list[Bar]:
    points = [each for each in results if each.kind == speculative.KIND]
    bars = []
    for guesses, times in ((speculative.ARRANGED, 1.4), (speculative.LOOKUP, 1.5)):
        asked = f"speculative decoding with the 135M shape, {guesses}: {times:g} times the speed of plain decoding"
        bars.append(ratio_bar(asked, at(points, **{"guesses by": guesses}), speculative.PLAIN, times))
    return bars


def _streaming(results: Sequence[Measured]) -> list[Bar]:
    points = at([each for each in results if each.kind == streaming.KIND], window=1024, sinks=4)
    far = (
        f"streaming over 1,024 tokens and 4 sinks, up to {points[-1].point['tokens so far']:,} tokens" if points else ""
    )
    far = far or "streaming over 1,024 tokens and 4 sinks"
    bars = [
        ratio_bar(f"{far}: flat in time, beside a module at its start", points, streaming.AT_THE_START, FLAT),
        ratio_bar(f"{far}: 20 times as fast as recomputing the window", points, streaming.RECOMPUTING, 20.0),
    ]
    asked = f"{far}: flat in memory (its cache to the byte, the process within {FLAT_MEMORY} MB)"
    if not points:
        return [*bars, Bar(asked, None, "")]
    held = {each.held[OURS] for each in points}
    gained = points[-1].details["resident MB"] - points[0].details["resident MB"]
    figures = f"cache {max(held):,} bytes, the process {gained:+.0f} MB"
    return [*bars, Bar(asked, len(held) == 1 and gained <= FLAT_MEMORY, figures)]


def _training(results: Sequence[Measured]) -> list[Bar]:
    points = [each for each in results if each.kind == training.KIND]
    rivals = [name for name in (TORCH, WHOLE) if any(name in each.ratios for each in points)]
    asked = "training step not slower than"
    bars = [not_behind_bar(f"{asked} {name}", points, name) for name in rivals] or [
        Bar(f"{asked} torch.nn.MultiheadAttention and transformers", None, "")
    ]
    asked = "training step: peak memory not above theirs"
    if not points:
        return [*bars, Bar(asked, None, "")]

    def least(each: Measured) -> float:
        return min(each.held[name] for name in rivals if name in each.held) / each.held[OURS]

    worst = min(points, key=least)
    return [*bars, Bar(asked, least(worst) >= 1.0, f"worst {least(worst):.2f} times our memory ({where(worst)})")]


def _parallel(results: Sequence[Measured]) -> list[Bar]:
    points = [each for each in results if each.kind == tensor_parallel.KIND]
    return [part_bar("a decode step on two ranks: at most 2.5 times that of one", points, tensor_parallel.ALONE, 2.5)]


def _import(results: Sequence[Measured]) -> list[Bar]:
    points = [each for each in results if each.kind == importing.KIND]
    bars = [
        detail_bar("import of transformer: under 0.2 s over import torch", points, importing.SECONDS, lambda _: 0.2)
    ]
    ways = {f", {way}": importing.name_of(way) for way in (importing.WITHOUT, importing.OFF)}
    earlier = importing.name_of(importing.BEFORE)
    beside = [each for each in points if earlier in each.details]
    for words, name in {"": importing.SECONDS, **ways}.items():
        asked = f"import of transformer{words}: as before (within {SLACK * 1e3:.0f} ms)"
        bars.append(detail_bar(asked, beside, name, lambda each: each.details[earlier] + SLACK))
    return bars
