"""Residual stream of one call over a sequence that ranks share: whole, or, between the blocks, this rank's part."""

from torch import Tensor, nn

from ..cache import SequenceCall, Step

LEAST_CHUNK = 16
"""Tokens of a chunk from which ranks share the work of a call that each is given whole; below, where gathers cost more
than they save, each does all of it. (An estimate: no machine with a network was at hand.)"""


class SharedStream:
    """The form of the states between the blocks of one call.

    Without caches a rank is given its part and gives it back; padding of it is exactly 0 at the end. With caches it is
    given all tokens: of a long call, such as a prompt, its blocks compute its part, and the states of all tokens are
    gathered once, at the end.
    """

    def __init__(self, call: SequenceCall, steps: tuple[Step, ...]) -> None:
        self._call = call
        self._takes_part = not call.is_part and call.length >= 2 * call.sequence.ranks * LEAST_CHUNK
        self._steps = {id(step): step.of_part() for step in steps} if self._takes_part else {}
        self._is_whole = True

    def given_to(self, _: nn.Module, x: Tensor) -> Tensor:
        """The states `x` in the form that every module takes."""
        if not self._takes_part or not self._is_whole:
            return x
        self._is_whole = False
        return self._call.layout.taken(x, self._call.sequence.rank)

    def step_for(self, step: Step) -> Step:
        """The step of a block for the states in their present form."""
        return self._steps.get(id(step), step)

    def rows(self, x: Tensor) -> Tensor:
        """The states `x` in their present form as rows [B, L, E], as the call was given them."""
        if not self._is_whole:
            return self._call.layout.gathered(self._call.sequence, x)
        return x if self._call.real is None else x.masked_fill(~self._call.real.unsqueeze(-1), 0.0)
