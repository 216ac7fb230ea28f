"""Parts of a run on several ranks: collectives alone, a model over tensor ranks, and a sequence that ranks share.

Each part is a function of a `Place` and a mesh that yields rows, dictionaries of what was measured; times are seconds
under names that end with "us", as they are shown. All ranks run all of it.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from transformer import DecoderOnlyTransformer
from transformer.parallel import gather_parts, parallelize, parts_of, share_sequence

from .collectives import Collectives, fitted
from .gpu_parts import Place, Row

QUICK = {"vocab_size": 512, "d_model": 64, "num_heads": 4, "d_ff": 128, "num_layers": 2}
LARGE = {"vocab_size": 32000, "d_model": 1024, "num_heads": 16, "d_ff": 4096, "num_layers": 16}
"""Sizes of a model that tries the script, and of one of 0.3B parameters for a card."""


def collectives(place: Place, mesh: DeviceMesh) -> Iterator[Row]:
    """All-reduces and all-gathers of few and of many bytes, the latency, and the bytes per second that a rank sends."""
    ranks = mesh.size()
    for name, make in (("all-reduce", _reduce), ("all-gather", _gather)):
        row: Row = {"collective": name}
        points = []
        for size in (1 << 10, 1 << 18) if place.quick else (1 << 13, 1 << 20, 1 << 26):
            call = make(place, size // 2, ranks)
            seconds = place.seconds(call)
            row[f"{size:,} bytes, us"] = seconds
            with Collectives(ranks) as counted:
                call()
            points.append((counted.sent[name], seconds))
        row["latency, us"], row["bytes per second"] = fitted(points) if ranks > 1 else (points[0][1], None)
        yield row


def _reduce(place: Place, numbers: int, _ranks: int) -> Callable[[], object]:
    x = place.random(numbers)
    return lambda: dist.all_reduce(x)


def _gather(place: Place, numbers: int, ranks: int) -> Callable[[], object]:
    part, whole = place.random(numbers), place.random(ranks * numbers)
    return lambda: dist.all_gather_into_tensor(whole, part)


def tensor_parallel(place: Place, mesh: DeviceMesh) -> Iterator[Row]:
    """A decode step of a model alone and over the ranks, and what a rank sends for a token of a prompt."""
    model, ranks = _model(place), mesh.size()
    config = model.config
    ids = torch.randint(2, config.vocab_size, (1, 32 if place.quick else 1024), device=place.device)
    expected, alone = _decoded(place, model, ids)
    nbytes = config.d_model * expected.element_size()
    logits, parallel = _decoded(place, parallelize(model, mesh), ids)
    with Collectives(ranks) as counted:
        model(ids, logits_to_keep=1)
    yield {
        "tensor ranks": ranks,
        "step alone, us": alone,
        "step, us": parallel,
        "difference": _difference(logits, expected),
        "bytes sent per token": counted.sent["all-reduce"] / ids.numel(),
        "by the formula": (2 * config.num_layers + 1) * 2 * (ranks - 1) / ranks * nbytes,
    }


def shared_sequence(place: Place, mesh: DeviceMesh) -> Iterator[Row]:
    """A forward of a sequence and a decode step after it, alone and where ranks share it; and what a rank sends."""
    model, ranks = _model(place), mesh.size()
    ids = torch.randint(2, model.config.vocab_size, (1, 64 if place.quick else 8192), device=place.device)
    expected, alone = model(ids), place.seconds(lambda: model(ids))
    config, size = model.config, expected.element_size()
    head_dim = config.d_model // config.num_heads
    with share_sequence(model, mesh):
        part = parts_of(ids, mesh)
        logits, shared = gather_parts(model(part), mesh), place.seconds(lambda: model(part))
        with Collectives(ranks) as counted:
            model(part)
    yield {
        "sequence ranks": ranks,
        "forward alone, us": alone,
        "forward, us": shared,
        "difference": _difference(logits, expected),
        "bytes sent per token": counted.sent["all-gather"] / part.numel(),
        "by the formula": config.num_layers * (ranks - 1) * 2 * config.kv_heads * head_dim * size,
    }
    expected, alone = _decoded(place, model, ids)
    with share_sequence(model, mesh):
        logits, shared = _decoded(place, model, ids)
        model(ids, logits_to_keep=1)
        with Collectives(ranks) as counted:
            model(ids[:, :1], logits_to_keep=1)
        model.clear_cache()
    yield {
        "sequence ranks": ranks,
        "step alone, us": alone,
        "step, us": shared,
        "difference": _difference(logits, expected),
        "bytes sent per step": counted.sent["all-gather"],
        "by the formula": config.num_layers * (ranks - 1) * config.num_heads * (head_dim + 1) * 4,
    }


def _model(place: Place) -> DecoderOnlyTransformer:
    """The same model on every rank."""
    torch.manual_seed(0)
    sizes = QUICK if place.quick else LARGE
    with torch.device(place.device):
        model = DecoderOnlyTransformer(**sizes, attention="gqa", num_groups=sizes["num_heads"] // 2).eval()
    return model.to(torch.bfloat16) if place.cuda else model


def _decoded(place: Place, model: DecoderOnlyTransformer, ids: Tensor) -> tuple[Tensor, float]:
    """The logits [B, V] of the token after a prompt and one more, and the seconds of a decode step."""
    model.enable_cache()
    model(ids, logits_to_keep=1)
    token = ids[:, :1].clone()
    logits = model(token)[:, -1]
    seconds = place.seconds(lambda: model(token, logits_to_keep=1))
    model.clear_cache()
    return logits, seconds


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
