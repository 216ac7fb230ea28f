"""Residual stream of one call of a stack: rows as given, or, between blocks that take it so, one flat run of tokens."""

from torch import Tensor, nn

from ..cache import FlatRun, Step
from ..plain import is_token_wise
from ..tracing import is_traced


class FlatStream:
    """The form of the states between the blocks of one call over a padded batch.

    A block of this library is given the flat run [1, N, E] of the real tokens; any other module, such as one of the
    user's own, a wrapper, or a module with hooks, is given rows [B, L, E]. `is_token_wise` decides. So padding leaves
    once and comes back once, as exactly 0, unless blocks of both kinds alternate.
    """

    def __init__(self, run: FlatRun, steps: tuple[Step, ...]) -> None:
        self.run = run
        self.flat = False
        self._steps = {id(step): step.of_flat_run() for step in steps}

    @classmethod
    def of(cls, x: Tensor, steps: tuple[Step, ...]) -> "FlatStream | None":
        """The stream of a call with `x` [B, L, E]; None where it stays as given: without padding, and while traced."""
        run, shape = steps[0].run, tuple(x.shape[:2])
        if run is None or run.width == 0 or shape != (steps[0].batch, steps[0].tokens) or is_traced(x):
            return None
        return cls(run, steps)

    def given_to(self, module: nn.Module, x: Tensor) -> Tensor:
        """The states `x` in the form that `module` takes."""
        before, self.flat = self.flat, is_token_wise(module)
        if self.flat is before:
            return x
        return self.run.take(x) if self.flat else self.run.put_back(x)

    def step_for(self, step: Step) -> Step:
        """The step of a block for the states in their present form."""
        return self._steps[id(step)] if self.flat else step

    def rows(self, x: Tensor) -> Tensor:
        """The states `x` in their present form as rows [B, L, E]."""
        return self.run.put_back(x) if self.flat else x
