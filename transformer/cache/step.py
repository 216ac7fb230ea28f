"""Step of one call: the facts that every layer of one kind shares, such as positions, rule, and real tokens."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..deprecation import warn_old
from ..masks import EVERYTHING, NO_TOKEN, Rule, positions
from .lengths import EMPTY, Lengths

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One call, worked out once and handed to each layer of its kind.

    Padding takes no position: inside an attention module the real tokens of each row stand left-aligned, `width` =
    the largest number of new tokens in a row, and `unpack` puts the outputs back where their tokens were.

    Example: two rows of which the first has seen 5 tokens and the second 2, called with the mask
    `[[0, 1, 1], [0, 0, 1]]`: `past_lengths = (5, 2)`, `new_lengths = (2, 1)`, `total_lengths = (7, 3)`, `width = 2`,
    query positions `[[5, 6], [2, 3]]` (the last one is padding), `order = [[1, 2], [2, 0]]`.
    """

    rule: Rule
    batch: int
    tokens: int
    """L as given, padding included."""
    past_lengths: Lengths
    """How many tokens each row had seen when the call began: the position of its first new token."""
    new_lengths: Lengths
    """How many new real tokens each row has."""
    device: torch.device
    real: Tensor | None = None
    """bool [B, L], true for a real token; None where all are."""
    order: Tensor | None = None
    """int64 [B, width]: the given column of each left-aligned token; None where they stand so already."""
    at: Tensor | None = None
    """int64 [1 or B, L]: the positions, where only the device knows them (traced calls); None elsewhere."""
    traced: bool = False
    """True in a traced call without a cache: padding is masked, not packed away."""
    expanding_context: bool | None = None
    """The mode that the call was planned in; None: that of the module itself."""
    _shared: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    _in_call: dict[Hashable, Any] | None = field(default=None, repr=False, compare=False)
    if TYPE_CHECKING:
        # Set when a step is made, and no fields: FSDP casts a step by `dataclasses.replace` of every field.
        total_lengths: Lengths = field(init=False)
        """How many tokens each row has seen when the call is done."""
        width: int = field(init=False)
        """The largest number of new real tokens in a row."""
        uniform: bool = field(init=False)
        """True if all rows are at the same positions and have the same number of new tokens."""

    def __post_init__(self) -> None:
        past, new = Lengths(self.past_lengths), Lengths(self.new_lengths)
        one = len(past) == 1 == len(new)
        # A frozen dataclass is filled in no other way; compilers follow it when it is written out.
        object.__setattr__(self, "past_lengths", past)
        object.__setattr__(self, "new_lengths", new)
        object.__setattr__(self, "total_lengths", Lengths((past[0] + new[0],)) if one else past + new)
        object.__setattr__(self, "width", max(new))
        object.__setattr__(self, "uniform", one and self.at is None)

    @classmethod
    def of(cls, x: Tensor, real: Tensor | None, on_host: Tensor | None = None) -> "Step":
        """The tokens of `x` [B, L, E], of which `real` (bool [B, L]) are none of padding, as the first of their rows.

        None: all are real, and nothing is looked at. `on_host` is the same mask on the CPU, where it was copied
        already: this is the one look that a call takes at its mask. The rule is that every token sees every other;
        `following` gives the step under another rule, after other tokens.
        """
        batch, tokens = x.shape[:2]
        if real is None:
            return cls(EVERYTHING, batch, tokens, EMPTY, Lengths((tokens,)), x.device)
        on_host = real.cpu() if on_host is None else on_host
        new = Lengths.of(on_host.sum(-1).tolist()) or EMPTY
        if max(new) == tokens == min(new):
            return cls(EVERYTHING, batch, tokens, EMPTY, new, x.device)
        order = None
        if not bool((on_host[:, :-1] >= on_host[:, 1:]).all()):
            # A stable sort by "is padding" brings the real tokens of each row to the front, in their order.
            order = (~on_host).byte().argsort(dim=-1, stable=True)[:, : max(new)].to(x.device, non_blocking=True)
        past = EMPTY.expand(len(new))
        return cls(EVERYTHING, batch, tokens, past, new, x.device, real=real, order=order)

    @classmethod
    def traced_of(cls, x: Tensor, real: Tensor | None) -> "Step":
        """The same in a traced call without a cache: tensors alone. Its lengths mean nothing: `at` counts."""
        batch, tokens = x.shape[:2]
        if real is None:
            at = torch.arange(tokens, dtype=torch.int64, device=x.device).unsqueeze(0)
        else:
            at = (real.long().cumsum(-1) - 1).masked_fill(~real, NO_TOKEN)
        return cls(EVERYTHING, batch, tokens, EMPTY, EMPTY, x.device, real=real, at=at, traced=True)

    def following(self, past_lengths: Lengths, rule: Rule, expanding_context: bool | None = None) -> "Step":
        """The step of the same tokens under `rule`, after so many tokens of each row; see `expanding_context`."""
        past, new = past_lengths, self.new_lengths
        if self.real is not None:
            past, new = past.expand(len(new)), new.expand(len(past))
        return Step(
            rule,
            self.batch,
            self.tokens,
            past_lengths=past,
            new_lengths=new,
            device=self.device,
            real=self.real,
            order=self.order,
            at=self.at,
            traced=self.traced,
            expanding_context=expanding_context,
        )

    @property
    def before(self) -> Lengths:
        """Deprecated name of `past_lengths`."""
        warn_old("Step.before", "Step.past_lengths")
        return self.past_lengths

    @property
    def gained(self) -> Lengths:
        """Deprecated name of `new_lengths`."""
        warn_old("Step.gained", "Step.new_lengths")
        return self.new_lengths

    @property
    def after(self) -> Lengths:
        """Deprecated name of `total_lengths`."""
        warn_old("Step.after", "Step.total_lengths")
        return self.total_lengths

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make()`, worked out by the first layer that asks and reused by the others."""
        try:
            value: T = self._shared[key]
        except KeyError:
            value = self._shared[key] = make()
        return value

    def once_in_call(self, key: Hashable, make: Callable[[], T]) -> T:
        """The same for what may change between two calls that are given the same step, as learned numbers do."""
        if self._in_call is None:
            return make()
        if key not in self._in_call:
            self._in_call[key] = make()
        value: T = self._in_call[key]
        return value

    def for_one_call(self) -> "Step":
        """The same step for one call of several layers, which then share what one of them has worked out."""
        return replace(self, _in_call={})

    @property
    def query_positions(self) -> range | Tensor:
        """Positions of the left-aligned tokens: a range where all rows are equal, else int64 [B, width]."""
        host = self.host_positions
        if isinstance(host, range) or self.at is not None:
            return host
        return self.once("query positions", partial(host.to, self.device, non_blocking=True))

    @property
    def host_positions(self) -> range | Tensor:
        """The same on the host, which need not wait for the device to tell them (except in compiled steps)."""
        if self.at is not None:
            return self.at
        if self.uniform:
            return range(self.past_lengths[0], self.past_lengths[0] + self.width)
        return self.once("host positions", self._ragged_positions)

    @property
    def sink_query_positions(self) -> range | Tensor:
        """Positions of the queries for scores with sinks, on the host: at most the rule's `max_sink_distance`."""
        host, max_sink_distance = self.host_positions, self.rule.max_sink_distance
        if max_sink_distance is None:
            return host
        if isinstance(host, Tensor):
            return host.clamp(max=max_sink_distance)
        if len(host) == 1:
            sink_query = min(host.start, max_sink_distance)
            return range(sink_query, sink_query + 1)
        return positions(host).unsqueeze(0).clamp(max=max_sink_distance)

    @property
    def token_positions(self) -> range | Tensor:
        """Positions of the columns as given: a range where all rows are equal and without padding, else int64 [B, L]
        with `NO_TOKEN` at padding."""
        if self.real is None or self.at is not None:
            return self.query_positions
        return self.once("token positions", partial(self._given_positions, self.real))

    def pack(self, x: Tensor) -> Tensor:
        """`x` [B, L, E] to [B, width, E]: real tokens left-aligned, everything else exactly 0."""
        if self.real is None:
            return x
        if self.order is not None:
            x = self._picked("packed tokens", x, self.order)
        elif self.width < self.tokens:
            x = x[:, : self.width]
        if min(self.new_lengths) == self.width:
            return x
        padding = ~self.once("packed", self._packed_real).unsqueeze(-1)
        # In place where it is a tensor of our own: a fourth of the time.
        return x.masked_fill(padding, 0.0) if self.order is None else x.masked_fill_(padding, 0.0)

    def unpack(self, x: Tensor, dim: int = 1) -> Tensor:
        """`x` with `width` entries along `dim` (and B rows) back to the L columns as given, 0 at padding."""
        if self.real is None:
            return x
        shape = [1] * x.ndim
        shape[0], shape[dim] = self.batch, self.tokens
        if dim == 1 and x.ndim == 3:
            given = self._picked("given tokens", x, self._rank(self.real))
        else:
            given = x.take_along_dim(self._rank(self.real).view(shape), dim)
        return given.masked_fill_(~self.real.view(shape), 0.0)

    def _picked(self, name: str, x: Tensor, column: Tensor) -> Tensor:
        """The tokens of `x` [B, N, E] in columns [B, M], as whole tokens: a fourth of what numbers one by one cost."""
        flat = self.once(name, partial(_flat, column, x.shape[1]))
        return x.flatten(0, 1).index_select(0, flat).view(*column.shape, x.shape[2])

    def _ragged_positions(self) -> Tensor:
        return self.past_lengths.expand(self.batch).column() + torch.arange(self.width, device="cpu")

    def _given_positions(self, real: Tensor) -> Tensor:
        position = self.past_lengths.column(self.device) + self._rank(real)
        return position.masked_fill(~real, NO_TOKEN)

    def _rank(self, real: Tensor) -> Tensor:
        return self.once("rank", partial(_rank, real))

    def _packed_real(self) -> Tensor:
        return torch.arange(self.width, device=self.device) < self.new_lengths.column(self.device)


def _flat(column: Tensor, length: int) -> Tensor:
    """Columns [B, M] of each row as indices into all rows of that length, one after the other."""
    return (column + length * torch.arange(column.shape[0], device=column.device).unsqueeze(1)).flatten()


def _rank(real: Tensor) -> Tensor:
    """For each given column [B, L], where its token stands among the left-aligned ones."""
    return (real.long().cumsum(-1) - 1).clamp(min=0)
