"""Filters of tokens by the shape of their distribution: typical sampling, and exclusion of the top choices."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, shown
from .processors import check_number

INF = math.inf


@dataclass(frozen=True, slots=True)
class TypicalP:
    """Locally typical sampling (arXiv 2202.00666): keeps the tokens whose information is nearest to the entropy.

    In the order of the distance between a token's negative log probability and the entropy of all tokens, tokens are
    kept until their probabilities sum to `p`, with all tokens at the same distance as the last of them. The most
    probable token can be excluded. 1 keeps all tokens.

    Raises ArgumentError for a `p` that is not above 0 and at most 1.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("typical_p", self.p, above=0.0, most=1.0)

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        if self.p == 1:
            # A rounded sum can reach 1 before the last token.
            return scores
        log_probabilities = scores.log_softmax(-1)
        probabilities = log_probabilities.exp()
        entropy = torch.special.entr(probabilities).sum(-1, keepdim=True)
        distances = (-log_probabilities - entropy).abs()
        ordered, order = distances.sort(stable=True)
        sums = probabilities.gather(1, order).cumsum(-1)
        last = (sums < self.p).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
        return scores.masked_fill(distances > ordered.gather(1, last), -INF)


@dataclass(frozen=True, slots=True)
class XTC:
    """Excludes the top choices, all but the least probable of them, at some steps ("exclude top choices").

    With the chance `probability`, drawn for each row and step, the tokens with at least a probability of `threshold`
    are excluded, except the least probable of these. So a step changes only if there are two such tokens. Published
    for text-generation-webui (github.com/oobabooga/text-generation-webui/pull/6335); llama.cpp has the same names with
    `xtc_` before them. Both apply it after filters such as `MinP`.

    Args:
        probability: above 0 and at most 1.
        threshold: above 0 and at most 1; above 0.5 nothing is excluded.
        generator: random generator; equal seeds give equal steps. Default: that of PyTorch.

    Raises ArgumentError, with the name of the option, for other values.
    """

    probability: float = 0.5
    threshold: float = 0.1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_number("xtc_probability", self.probability, above=0.0, most=1.0)
        check_number("xtc_threshold", self.threshold, above=0.0, most=1.0)
        if not isinstance(self.generator, torch.Generator | None):
            raise ArgumentError(f"generator: expected a torch.Generator or None, got {shown(self.generator)}")

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        device = scores.device if self.generator is None else self.generator.device
        drawn = torch.rand(scores.shape[0], 1, generator=self.generator, device=device)
        excludes = (drawn < self.probability).to(scores.device, non_blocking=True)
        probabilities = scores.softmax(-1)
        least = probabilities.masked_fill(probabilities < self.threshold, INF).amin(-1, keepdim=True)
        return scores.masked_fill(excludes & (probabilities > least), -INF)
