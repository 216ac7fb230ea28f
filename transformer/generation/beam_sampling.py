"""Processors for sampled candidates of a beam search, whose scores are summed log probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .processors import Processor, Temperature
from .row_options import RowOptions

LEAST = -1e30
"""Least score of a token that is not excluded: finite also in a sum over the tokens of a row, in float32."""


@dataclass(frozen=True, slots=True)
class LogTemperature:
    """Divides log probabilities by `temperature`, without an offset, so that candidates stay comparable."""

    temperature: float

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        info = torch.finfo(scores.dtype)
        # Converted to float, because PyTorch refuses very large ints.
        temperature = float(min(max(self.temperature, info.tiny), info.max))
        return torch.where(scores.isfinite(), (scores / temperature).clamp(min=LEAST), scores)


@dataclass(frozen=True, slots=True)
class KeepingAtLeast:
    """A processor that excludes tokens, except the `count` most probable ones."""

    processor: Processor
    count: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.topk(min(self.count, scores.shape[-1]))
        return self.processor(input_ids, scores).scatter(-1, best.indices, best.values)


def candidates_of_beam(options: RowOptions) -> int:
    """How many candidates each beam gives at most: one goes on if all others end."""
    return max(2, 1 + len(set(options.stop_tokens)))


def beam_sampling(options: RowOptions) -> list[Processor]:
    """The processors, in order, that make the scores that candidates are sampled by."""
    chain = options.sampling()
    return [
        LogTemperature(each.temperature)
        if isinstance(each, Temperature)
        else KeepingAtLeast(each, candidates_of_beam(options))
        for each in chain
    ]
