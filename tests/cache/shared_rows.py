"""Rows that share a prefix, beside the same rows with tokens of their own, for comparison."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.oracle import Options
from tests.setups import SCHEMES, padding, tokens
from transformer import LayerCache
from transformer.kernels import tuned

KINDS = {
    "MHA": Options(num_groups=4, scheme=SCHEMES["rotary halves"]),
    "GQA": Options(num_groups=2, scheme=SCHEMES["rotary interleaved"]),
    "MQA": Options(num_groups=1, scheme=SCHEMES["none"]),
    "soft cap, norms": Options(num_groups=2, scheme=SCHEMES["rotary halves"], softcap=1.5, qk_norm=True),
    "not causal": Options(num_groups=2, causal=False),
    "ALiBi": Options(num_groups=2, scheme=SCHEMES["alibi"]),
    "buckets": Options(num_groups=2, scheme=SCHEMES["t5 causal"]),
    "window": Options(num_groups=2, scheme=SCHEMES["rotary halves"], window_size=4),
    "window and sinks": Options(num_groups=2, scheme=SCHEMES["rotary halves"], window_size=4, num_sinks=2),
}
"""Of the last four no call reads a prefix."""

SHARING = [*KINDS][:5]
PROMPTS = {"one prompt": [9], "two": [7, 7], "ragged": [9, 3, 6]}
ROWS = {"one prompt": [0, 0, 0, 0], "two": [0, 0, 0, 1, 1, 1], "ragged": [2, 0, 0, 2, 1, 0]}
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}
"""As parts of the largest value."""


class Pair:
    """One conversation twice: with repeated rows that share their tokens, and with rows that hold them apart."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, name: str, seed: int = 0) -> None:
        self.module, self.dtype, self.count, lengths = module, dtype, seed, PROMPTS[name]
        x = tokens(len(lengths), max(lengths), 16, seed=99, dtype=dtype)
        module.kv_cache = None
        with torch.no_grad():
            module(x, attention_mask=padding([(0, length) for length in lengths], max(lengths)))
        self.shared, self.apart = module.kv_cache, module.kv_cache.fork()
        self.select(ROWS[name])

    def select(self, rows: list[int]) -> None:
        with tuned(min_shared_bytes=0):
            assert self.shared.select(rows) is self.shared
        with tuned(min_shared_bytes=1 << 40):
            self.apart.select(rows)

    def both(self, change: Callable[[LayerCache], LayerCache | None]) -> None:
        """The same operation on both; one that gives a new cache continues with that."""
        self.shared = change(self.shared) or self.shared
        self.apart = change(self.apart) or self.apart

    def said(self, length: int, mask: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
        self.count += 1
        x = tokens(self.apart.batch, length, 16, seed=self.count, dtype=self.dtype)
        outs = []
        for cache in (self.shared, self.apart):
            self.module.kv_cache = cache
            out = self.module(x, attention_mask=mask, **options)
            outs.append(out[0] if isinstance(out, tuple) else out)
        return outs[0], outs[1]

    @torch.no_grad()
    def say(self, length: int, mask: Tensor | None = None, **options: object) -> None:
        shared, apart = self.said(length, mask, **options)
        assert_same(shared, apart, atol=BOUND[self.dtype] * max(1.0, float(apart.abs().max())))
        self.check()

    def check(self) -> None:
        """Both hold the same."""
        for name in ("key", "value"):
            assert_same(self.shared[name].detach(), self.apart[name].detach(), atol=BOUND[self.dtype])
        for name in ("length", "cached_length", "batch", "window"):
            assert getattr(self.shared, name) == getattr(self.apart, name)
        assert self.shared.lengths.tolist() == self.apart.lengths.tolist()
        assert self.shared.cached_lengths.tolist() == self.apart.cached_lengths.tolist()
        assert self.shared.nbytes_used <= self.apart.nbytes_used

    @property
    def shares(self) -> bool:
        return self.shared.nbytes_used < self.apart.nbytes_used
