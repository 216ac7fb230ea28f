"""Step of one call: the facts that every layer of one kind shares, such as positions, rule, and real tokens."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..deprecation import warn_old
from ..masks import EVERYTHING, NO_TOKEN, Rule
from .flat_run import FlatRun
from .lengths import EMPTY, Lengths
from .shared_sequence import SequenceCall
from .step_positions import StepPositions
from .token_layout import TokenLayout

T = TypeVar("T")


@dataclass(frozen=True)
class Step(StepPositions):
    """One call, worked out once and handed to each layer of its kind.

    Padding takes no position, and no part in a call: `run` has the real tokens as one flat run, and as rows whose
    tokens stand left-aligned, `width` = the largest number of new tokens in a row.

    Example: two rows of which the first has seen 5 tokens and the second 2, called with the mask
    `[[0, 1, 1], [0, 0, 1]]`: `past_lengths = (5, 2)`, `new_lengths = (2, 1)`, `total_lengths = (7, 3)`, `width = 2`,
    query positions `[[5, 6], [2, 3]]` (the last one is padding), `flat_positions = [[5, 6, 2]]`.
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
    run: FlatRun | None = None
    """Where the real tokens are; None where all are real and rows are one document each, and in traced calls."""
    flat: bool = False
    """True if the call is given the flat run [1, N, E] of the real tokens instead of [B, L, E], and gives it back."""
    at: Tensor | None = None
    """int64 [1 or B, L]: the positions, where only the device knows them (traced calls); None elsewhere."""
    traced: bool = False
    """True in a traced call without a cache: padding is masked, not packed away."""
    expanding_context: bool | None = None
    """The mode that the call was planned in; None: that of the module itself."""
    sequence: SequenceCall | None = None
    """What the call knows of a sequence that ranks share; None where it is whole here."""
    layout: TokenLayout | None = None
    """What the caller said of the tokens, checked, its numbers int64; None: rows are one document each."""
    prefix: Lengths | None = None
    """How many tokens of each row see each other in both directions; None: none, and in traced calls."""
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
        if self.sequence is not None and self.sequence.is_part:
            object.__setattr__(self, "total_lengths", past + self.sequence.length)
            object.__setattr__(self, "uniform", False)

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
        past, run = EMPTY.expand(len(new)), FlatRun(on_host, new.expand(batch), x.device)
        return cls(EVERYTHING, batch, tokens, past, new, x.device, real=real, run=run)

    @classmethod
    def traced_of(cls, x: Tensor, real: Tensor | None, layout: TokenLayout | None = None) -> "Step":
        """The same in a traced call without a cache: tensors alone. Its lengths mean nothing: `at` counts."""
        batch, tokens = x.shape[:2]
        if layout is not None and layout.segment_ids is not None:
            at = layout.positions_in_documents(layout.segment_ids)
            layout = layout if layout.position_ids is not None else layout._replace(position_ids=at)
        elif real is None:
            at = torch.arange(tokens, dtype=torch.int64, device=x.device).unsqueeze(0)
        else:
            at = (real.long().cumsum(-1) - 1).masked_fill(~real, NO_TOKEN)
        return cls(EVERYTHING, batch, tokens, EMPTY, EMPTY, x.device, real=real, at=at, traced=True, layout=layout)

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
            run=self.run,
            at=self.at,
            traced=self.traced,
            expanding_context=expanding_context,
            sequence=self.sequence,
            layout=self.layout,
            prefix=self.prefix,
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
    def packed(self) -> bool:
        """True if rows contain documents that do not see each other."""
        return self.layout is not None and self.layout.segment_ids is not None

    @property
    def shape(self) -> tuple[int, int]:
        """The first two sizes of `x`: [B, L], or [1, N] of a flat run."""
        if self.flat and self.run is not None:
            return 1, self.run.given.shape[0]
        return self.batch, self.tokens

    @property
    def host_positions(self) -> range | Tensor:
        """`query_positions` on the host, which need not wait for the device to tell them (except in compiled steps)."""
        if self.at is not None:
            return self.at
        if self.uniform:
            return range(self.past_lengths[0], self.past_lengths[0] + self.width)
        return self.once("host positions", self._ragged_positions)

    def of_part(self) -> "Step":
        """The step of this rank's part of the tokens, where every rank is given all of them."""
        if self.sequence is None:
            raise RuntimeError("of_part: expected a step of a shared sequence")
        sequence = self.sequence._replace(is_part=True)
        length = sequence.layout.part_length(sequence.sequence.rank)
        kept: dict[str, Any] = {"_shared": {}, "_in_call": None if self._in_call is None else {}}
        return replace(self, tokens=length, new_lengths=Lengths((length,)), sequence=sequence, **kept)

    def of_flat_run(self) -> "Step":
        """The same step for the flat run of its tokens. Both share what one of them has worked out."""
        return replace(self, flat=True)
