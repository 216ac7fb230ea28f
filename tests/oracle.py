"""Oracle of the attention modules: an independent implementation in plain Python loops over float64.

Nothing here is shared with the library. Visibility, positions, sinks, distances, rotary pairs, ALiBi slopes
and T5 buckets are worked out for one query and one key at a time, on lists of floats, straight from the
written rules. The only things taken from a module are its numbers: projection weights, norm weights and the
bias table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.oracle_codecs import STORED
from tests.oracle_positions import Buckets, Rotary, Scheme, Slopes, Vector


@dataclass(frozen=True)
class Options:
    """What a module was built with, as plain data."""

    embed_dim: int = 16
    num_heads: int = 4
    num_groups: int = 4
    head_dim: int = 4
    causal: bool = True
    cached: bool = True
    window_size: int | None = None
    num_sinks: int = 0
    scale: float | None = None
    softcap: float | None = None
    sink_logits: bool = False
    qk_norm: bool = False
    qk_norm_per_head: bool = True
    scheme: Scheme = None
    stored: tuple[str | None, str | None] = (None, None)
    """How a cache stores keys, rotated ones, and values, by the names of `oracle_codecs.STORED`; None: as they are."""
    shows: Callable[[int, int, int], bool] | None = None
    """Whether a rule of the user's own shows a query head and position a key position."""
    changed: Callable[[float, int, int, int], float] | None = None
    """A score as a rule of the user's own changes it: of a query head, a query position and a key position."""


@dataclass(frozen=True)
class Token:
    """A cached token of a row: its position, and one key (rotated) and value per key/value head."""

    position: int
    keys: list[Vector]
    values: list[Vector]
    placed: int
    """Where the position scheme takes it to be: its position, unless the caller says another one."""


@dataclass(frozen=True)
class Kept:
    """What a compression has left of a row: the positions of each key/value head, which since then count as if they
    were the newest of the `end` tokens that the row had then."""

    positions: list[list[int]]
    end: int

    @property
    def first(self) -> int:
        return self.end - len(self.positions[0])

    def counted(self, group: int, said: int) -> list[tuple[int, int]]:
        """Where each token of a head counts, and its position, of a row that has read `said` tokens."""
        return [*enumerate(self.positions[group], self.first), *((each, each) for each in range(self.end, said))]


def numbers(tensor: torch.Tensor) -> list:
    return tensor.detach().double().tolist()


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def rms_norm(vector: Vector, weight: Vector, eps: float) -> Vector:
    size = math.sqrt(dot(vector, vector) / len(vector) + eps)
    return [w * v / size for w, v in zip(weight, vector, strict=True)]


def softmax(scores: list[float], logit: float = -math.inf) -> list[float]:
    """As usual, and all zeros where there is nothing to look at; with `logit` beside the scores."""
    top = max([logit, *scores])
    if max(scores, default=-math.inf) == -math.inf:
        return [0.0] * len(scores)
    powers = [math.exp(score - top) for score in scores]
    total = sum(powers) + math.exp(logit - top)
    return [power / total for power in powers]


def spread(bias: torch.Tensor | None, batch: int, heads: int, new: int, columns: int) -> list[list[list[list[float]]]]:
    """`attn_bias` as nested lists of numbers to add; false of a bool tensor hides."""
    if bias is None:
        bias = torch.zeros(())
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape).masked_fill(~bias, -math.inf)
    return numbers(bias.expand(batch, heads, new, columns))


class Module:
    """A module's numbers, and what it does to single tokens."""

    def __init__(self, module: torch.nn.Module, options: Options) -> None:
        self.options = options
        scale = options.scale
        self.scale = 1 / math.sqrt(options.head_dim) if scale is None else scale
        self.layers: dict[str, tuple[list[Vector], Vector]] = {}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer = getattr(module, name)
            width = layer.weight.shape[0]
            bias = [0.0] * width if layer.bias is None else numbers(layer.bias)
            self.layers[name] = numbers(layer.weight), bias
        self.norms: dict[str, tuple[Vector, float]] = {}
        if options.qk_norm:
            for name in ("q_norm", "k_norm"):
                norm = getattr(module, name)
                self.norms[name] = numbers(norm.weight), norm.eps
        self.logits = numbers(module.sink_logits) if options.sink_logits else [-math.inf] * options.num_heads
        self.table: list[Vector] = []
        if isinstance(options.scheme, Buckets):
            self.table = numbers(module.position.embedding.weight)

    def linear(self, name: str, vector: Vector) -> Vector:
        weight, bias = self.layers[name]
        return [dot(row, vector) + shift for row, shift in zip(weight, bias, strict=True)]

    def heads(self, name: str, vector: Vector, norm: str | None = None) -> list[Vector]:
        size = self.options.head_dim
        flat = self.linear(name, vector)
        if norm in self.norms and not self.options.qk_norm_per_head:
            flat = rms_norm(flat, *self.norms[norm])
        heads = [flat[i : i + size] for i in range(0, len(flat), size)]
        per_head = norm in self.norms and self.options.qk_norm_per_head
        return [rms_norm(head, *self.norms[norm]) for head in heads] if per_head else heads

    def product(self, query: Vector, key: Vector) -> float:
        score = dot(query, key) * self.scale
        cap = self.options.softcap
        return score if cap is None else cap * math.tanh(score / cap)

    def score(self, head: int, query: Vector, at: int, token: Token, q: int) -> float:
        """The score of a query for a token's rotated key, with the addition of the position scheme, which the query
        meets at `at`. The query's position is `q`."""
        key, k = token.keys[head * self.options.num_groups // self.options.num_heads], token.placed
        scheme, changed = self.options.scheme, self.options.changed
        score = self.product(scheme.rotate(query, at) if isinstance(scheme, Rotary) else query, key)
        if changed is not None:
            score = changed(score, head, q, token.position)
        if isinstance(scheme, Slopes):
            return score - scheme.slope(head, self.options.num_heads) * abs(at - k)
        if isinstance(scheme, Buckets):
            return score + self.table[scheme.bucket(at - k)][head]
        return score

    def stored(self, x: Vector, position: int, placed: int) -> Token:
        """The token of an input vector, as a cache would show it."""
        scheme = self.options.scheme
        keys, values = self.heads("k_proj", x, "k_norm"), self.heads("v_proj", x)
        if isinstance(scheme, Rotary):
            keys = [scheme.rotate(key, placed) for key in keys]
        if self.options.cached:
            keys, values = (
                heads if name is None else [STORED[name](head) for head in heads]
                for heads, name in zip((keys, values), self.options.stored, strict=True)
            )
        return Token(position, keys, values, placed)

    def out(self, heads: list[Vector]) -> Vector:
        return self.linear("out_proj", [number for head in heads for number in head])


class Conversation:
    """One module's self-attention over a series of calls; each row keeps a plain list of the tokens it was fed, where
    those that it still holds begin, and what a compression has left of it."""

    def __init__(self, module: torch.nn.Module, options: Options) -> None:
        self.model, self.options = Module(module, options), options
        self.said: list[list[Token]] = []
        self.starts: list[int] = []
        self.kept: list[Kept | None] = []
        self.inferred: int | None = None

    def row(self, b: int, group: int) -> list[Token]:
        """What a key/value head of a row holds: all from the row's start on, and the sinks."""
        said, sinks, kept = self.said[b], self.options.num_sinks, self.kept[b]
        counted = [(each, each) for each in range(len(said))] if kept is None else kept.counted(group, len(said))
        held = [position for count, position in counted if count >= self.starts[b] and position >= sinks]
        return [said[position] for position in [*range(min(sinks, len(said))), *held]]

    @property
    def rows(self) -> list[list[Token]]:
        """The same of the first head of each row: all heads hold as many."""
        return [self.row(b, 0) for b in range(len(self.said))]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.said]

    @property
    def cached_lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def positions(self) -> list[list[int]]:
        return [[token.position for token in row] for row in self.rows]

    def held_values(self) -> torch.Tensor:
        """`[B, G, held, D]`, left-aligned and zero-filled: what `kv_cache['value']` must show."""
        options, held = self.options, max(self.cached_lengths)
        shape = (len(self.cached_lengths), options.num_groups, held, options.head_dim)
        values = torch.zeros(shape, dtype=torch.float64)
        for b in range(len(values)):
            for group in range(options.num_groups):
                for i, token in enumerate(self.row(b, group)):
                    values[b, group, i] = torch.tensor(token.values[group], dtype=torch.float64)
        return values

    def sees(self, h: int, q: int, k: int, window: int | None, prefix: int = 0) -> bool:
        """The whole rule; `window` is None where the call expands. The first `prefix` tokens see each other."""
        if self.options.shows is not None and not self.options.shows(h, q, k):
            return False
        if self.options.causal and k > q and not k < prefix:
            return False
        return window is None or abs(q - k) < window or k < self.options.num_sinks

    def met_at(self, q: int, k: int, window: int | None) -> int:
        """The position from which the key at `k` meets the query at `q`: sinks stay near."""
        sinks = self.options.num_sinks
        if window is not None and k < sinks:
            return min(q, window + sinks - 1)
        return q

    def window(self, expanding: bool | None, real: list[list[bool]]) -> int | None:
        """This call's window, or None where the call expands."""
        size = self.options.window_size
        if expanding is True or (expanding is None and size is None):
            return None
        if size is not None:
            return size
        if self.inferred is not None:
            return self.inferred
        longest = max(sum(row) for row in real)
        window = max(self.cached_lengths, default=0) or longest
        if self.options.cached and longest > 0:
            self.inferred = window
        return window

    def call(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        expanding_context: bool | None = None,
        attn_bias: torch.Tensor | None = None,
        prefixes: list[int] | None = None,
        placed: list[list[int]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs `[B, L, E]` and the weights `[B, H, L, S]` of one more call. `prefixes`: how many first tokens of
        each row see each other in both directions; `placed`: positions for the scheme, of each column."""
        options, model = self.options, self.model
        batch, new = x.shape[0], x.shape[1]
        if not self.said or not options.cached:
            self.said, self.starts, self.kept = [[] for _ in range(batch)], [0] * batch, [None] * batch
        held = max(self.cached_lengths)
        mask = torch.ones(batch, new, dtype=torch.bool) if attention_mask is None else attention_mask
        real = mask.bool().tolist()
        window = self.window(expanding_context, real)
        bias = spread(attn_bias, batch, options.num_heads, new, held + new)
        out = torch.zeros(batch, new, options.embed_dim, dtype=torch.float64)
        weights = torch.zeros(batch, options.num_heads, new, held + new, dtype=torch.float64)
        vectors = numbers(x)

        for b in range(batch):
            columns = [list(enumerate(self.row(b, group))) for group in range(options.num_groups)]
            asking: list[tuple[int, int]] = []
            prefix = 0 if prefixes is None else prefixes[b]
            for i in range(new):
                if real[b][i]:
                    position = len(self.said[b])
                    token = model.stored(vectors[b][i], position, position if placed is None else placed[b][i])
                    for row in columns:
                        row.append((held + i, token))
                    self.said[b].append(token)
                    asking.append((i, position))
            for i, q in asking:
                queries = model.heads("q_proj", vectors[b][i], "q_norm")
                mixed = []
                for h, query in enumerate(queries):
                    group = h * options.num_groups // options.num_heads
                    seen = [
                        (c, token) for c, token in columns[group] if self.sees(h, q, token.position, window, prefix)
                    ]
                    scores = []
                    for c, token in seen:
                        at = self.met_at(q, token.position, window) if placed is None else placed[b][i]
                        score = model.score(h, query, at, token, q)
                        scores.append(score + bias[b][h][i][c])
                    mixed.append([0.0] * options.head_dim)
                    for (c, token), share in zip(seen, softmax(scores, model.logits[h]), strict=True):
                        weights[b, h, i, c] = share
                        for d in range(options.head_dim):
                            mixed[h][d] += share * token.values[group][d]
                out[b, i] = torch.tensor(model.out(mixed), dtype=torch.float64)
            if asking and window is not None:  # a row that gains nothing also loses nothing
                self.starts[b] = max(self.starts[b], len(self.said[b]) - window)
        return out, weights


def cross(
    module: torch.nn.Module,
    options: Options,
    x: torch.Tensor,
    kv: torch.Tensor,
    kv_mask: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over an external source: every real query sees every real source token, positions play no
    part."""
    model = Module(module, options)
    batch, new, columns = x.shape[0], x.shape[1], kv.shape[1]
    out = torch.zeros(batch, new, options.embed_dim, dtype=torch.float64)
    weights = torch.zeros(batch, options.num_heads, new, columns, dtype=torch.float64)
    bias = spread(attn_bias, batch, options.num_heads, new, columns)
    for b in range(batch):
        seen = [c for c in range(columns) if kv_mask is None or bool(kv_mask[b, c])]
        source = numbers(kv[b])
        keys = {c: model.heads("k_proj", source[c], "k_norm") for c in seen}
        values = {c: model.heads("v_proj", source[c]) for c in seen}
        for i in range(new):
            if attention_mask is not None and not bool(attention_mask[b, i]):
                continue
            mixed = []
            for h, query in enumerate(model.heads("q_proj", numbers(x[b, i]), "q_norm")):
                group = h * options.num_groups // options.num_heads
                scores = [model.product(query, keys[c][group]) + bias[b][h][i][c] for c in seen]
                mixed.append([0.0] * options.head_dim)
                for c, share in zip(seen, softmax(scores, model.logits[h]), strict=True):
                    weights[b, h, i, c] = share
                    for d in range(options.head_dim):
                        mixed[h][d] += share * values[c][group][d]
            out[b, i] = torch.tensor(model.out(mixed), dtype=torch.float64)
    return out, weights
