"""Parts of the GPU grid over one layer: decode over cached keys, and prefill with and without windows.

Each part is a function of a `Place` that yields rows, dictionaries of a point and the seconds of each candidate. A
candidate that fails is an entry with the reason instead of a time; one whose package is not installed is left out.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from transformer import GroupQueryAttention
from transformer.kernels import Kernel

OURS, KERNEL = "ours", "ours, the kernel alone"
SDPA, FLEX, FLASH = "SDPA", "flex_attention", "flash-attention"
BURSTS, CALLS = 5, 8
"""Bursts of a candidate, and calls in a row of each; the first burst warms up."""

Row = dict[str, Any]
Call = Callable[[], object]


class Recorded(NamedTuple):
    """A CUDA graph of several calls."""

    replay: Call
    calls: int


Make = Callable[[], Call | Recorded]
"""A function that makes a candidate's call, and may fail."""


@dataclass(frozen=True)
class Place:
    """The device, the sizes and the end of a part's time."""

    device: str
    quick: bool
    ends: float = float("inf")

    @property
    def cuda(self) -> bool:
        """True on a card."""
        return self.device == "cuda"

    @property
    def late(self) -> bool:
        """True if the time of the part is over: points that are left are named, and not measured."""
        return time.monotonic() > self.ends

    def random(self, *shape: int) -> Tensor:
        """Numbers in bfloat16."""
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def wait(self) -> None:
        """Waits for the work on the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: "Call | Recorded") -> float:
        """Median seconds of a call over the bursts."""
        repeat, calls = (run.replay, run.calls) if isinstance(run, Recorded) else (run, 1)
        each = []
        for _ in range(BURSTS):
            self.wait()
            began = time.perf_counter()
            for _ in range(CALLS):
                repeat()
            self.wait()
            each.append((time.perf_counter() - began) / (calls * CALLS))
        return statistics.median(each[1:])

    def recorded(self, run: Call) -> "Call | Recorded":
        """Many calls in one CUDA graph, in which the host takes no time; the call itself on a CPU."""
        if not self.cuda:
            return run
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                run()
        return Recorded(graph.replay, CALLS)

    def bandwidth(self) -> float:
        """Bytes per second of a copy, what it reads and what it writes together."""
        count = 1 << (20 if self.quick else 29)
        source, target = (torch.empty(count, dtype=torch.float32, device=self.device) for _ in range(2))
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def measured(self, candidates: Mapping[str, Make]) -> Row:
        """Seconds of each candidate, or why there are none. Each entry makes its call, so that all of it may fail."""
        return {name: self._seconds_or_reason(make) for name, make in candidates.items()}

    def _seconds_or_reason(self, make: Make) -> float | str:
        try:
            return self.seconds(make())
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        finally:
            if self.cuda:
                torch.cuda.empty_cache()


def decode(place: Place) -> Iterator[Row]:
    """One token over cached keys, 32 heads of width 128, as CUDA graphs, in which the host takes no time."""
    heads, head_dim = (4, 16) if place.quick else (32, 128)
    for cached in (32, 64) if place.quick else (2048, 16384, 131072):
        for groups in (4, 1) if place.quick else (32, 8, 1):
            for rows in (1, 2) if place.quick else (1, 8, 32):
                nbytes = 4 * rows * groups * cached * head_dim
                point: Row = {"rows": rows, "keys": cached, "G": groups, "bytes": nbytes}
                if place.late or nbytes > 20e9:
                    yield {**point, "left out": "no time" if place.late else "over 20 GB"}
                    continue
                key, value = (place.random(rows, groups, cached, head_dim) for _ in range(2))
                yield {**point, **place.measured(_kernels(place, place.random(rows, heads, 1, head_dim), key, value))}
                del key, value


def _kernels(place: Place, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Make]:
    kernel, many = Kernel(query.shape[-1] ** -0.5), query.shape[1] != key.shape[1]
    candidates: dict[str, Make] = {
        KERNEL: lambda: place.recorded(lambda: kernel(query, key, value, causal=True)),
        SDPA: lambda: place.recorded(lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=many)),
    }
    # Compiled for each shape, in seconds: for one row and one length alone.
    if place.cuda and query.shape[0] == 1 and key.shape[2] == 16384:
        flex = torch.compile(flex_attention, dynamic=False)
        candidates[FLEX] = lambda: place.recorded(lambda: flex(query, key, value, enable_gqa=many))
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_with_kvcache

        token, cache = query.transpose(1, 2).contiguous(), [each.transpose(1, 2).contiguous() for each in (key, value)]
        candidates[FLASH] = lambda: place.recorded(lambda: flash_attn_with_kvcache(token, *cache, causal=True))
    return candidates


def prefill(place: Place) -> Iterator[Row]:
    """A whole prompt through one layer of width 4,096, with windows and without, and the same projections elsewhere."""
    embed, heads, groups = (64, 4, 2) if place.quick else (4096, 32, 8)
    points = ((64, None), (64, 16)) if place.quick else ((2048, None), (16384, None), (16384, 1024), (32768, 4096))
    for tokens, window in points:
        point: Row = {"tokens": tokens, "window": window or "none"}
        if place.late:
            yield {**point, "left out": "no time"}
            continue
        module = GroupQueryAttention(embed, heads, groups, True, bias=False, window_size=window)
        module = module.to(place.device, torch.bfloat16).eval()
        yield {**point, **place.measured(_layers(place, module, place.random(1, tokens, embed), window))}


def _layers(place: Place, module: GroupQueryAttention, x: Tensor, window: int | None) -> dict[str, Make]:
    tokens, heads, head_dim = x.shape[1], module.num_heads, module.head_dim

    def around(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        def layer() -> Tensor:
            parts = [each(x).view(1, tokens, -1, head_dim) for each in (module.q_proj, module.k_proj, module.v_proj)]
            out: Tensor = module.out_proj(attend(*parts).reshape(1, tokens, heads * head_dim))
            return out

        return layer

    def heads_first(attend: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda *parts: attend(*(part.transpose(1, 2) for part in parts)).transpose(1, 2)

    def flex() -> Call:
        compiled = torch.compile(flex_attention, dynamic=False)
        span = tokens if window is None else window
        sees = lambda _, __, i, j: (i >= j) & (i - j < span)  # noqa: E731
        mask = create_block_mask(sees, None, None, tokens, tokens, place.device)
        return around(heads_first(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)))

    candidates: dict[str, Make] = {OURS: lambda: lambda: module(x)}
    if window is None:
        sdpa = heads_first(lambda *parts: F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True))
        candidates[SDPA] = lambda: around(sdpa)
    if place.cuda:
        candidates[FLEX] = flex
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func

        span = (-1, -1) if window is None else (window - 1, 0)
        candidates[FLASH] = lambda: around(lambda q, k, v: flash_attn_func(q, k, v, causal=True, window_size=span))
    return candidates
