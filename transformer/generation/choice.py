"""Choice of the next token of each row from the model's logits, and its log probability."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..cache import on_device
from .edges import Edges
from .processors import Processor, processed
from .rows import Row

Groups = list[tuple[Tensor | None, list[Processor]]]
"""Processors, and the rows that they are for; None: all rows."""


class Choice:
    """Choice of the next token of rows, each with options of its own.

    Rows with equal options go through their processors together, and the processors of the user are called once with
    all rows if they are the same for all. A row with a seed is sampled by its own random generator.

    Args:
        rows: the rows, in the order of the logits.
        device: that of the logits.
        chains: the processors that make the distribution to sample from, of each row; None: those of its options.
    """

    def __init__(
        self, rows: Sequence[Row], device: torch.device, chains: Sequence[list[Processor]] | None = None
    ) -> None:
        self.rows = rows
        chains = [row.options.sampling() for row in rows] if chains is None else chains
        self._scoring = _groups([row.options.before_sampling() for row in rows], device)
        self._sampling = _groups(chains, device)
        shared = rows[0].options.processors
        if shared and len(self._scoring) > 1 and all(row.options.processors == shared for row in rows):
            # A processor may know the rows by their number.
            own = [row.options.before_sampling()[len(shared) :] for row in rows]
            self._scoring = [(None, list(shared)), *_groups(own, device)]
        self._edges = Edges(rows) if Edges.are_needed(rows) else None
        self.changes_scores = bool(self._scoring or self._sampling or self._edges)
        """False if the scores are the logits."""
        self._sampled = [bool(row.options.temperature) for row in rows]
        self._row_is_sampled: Tensor | None = None
        if any(self._sampled) and not all(self._sampled):
            self._row_is_sampled = torch.tensor(self._sampled, device="cpu").to(device, non_blocking=True)

    def scores(self, history: Tensor, logits: Tensor, new: int | Sequence[int]) -> Tensor:
        """The scores [B, V] of tokens after processors and options: -inf for tokens that are excluded.

        `history`: the tokens of each row so far, int64 [B, n], as processors see them. `new`: how many of them are new,
        in each row. Raises as `processed` does.
        """
        if self._scoring:
            logits = _applied(self._scoring, history, logits)
        if self._edges is not None:
            logits = self._edges(logits, [new] * len(self.rows) if isinstance(new, int) else new)
        if self._sampling:
            logits = _applied(self._sampling, history, logits)
        return logits

    def take(self, scores: Tensor) -> Tensor:
        """A token for each row of scores [B, V]: int64 [B]; the most probable one in rows without a temperature."""
        if not any(self._sampled):
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        # What `multinomial` draws by, with the same numbers of the generator, but without its two looks at the device.
        tokens = (probabilities / waiting_times(self.rows, probabilities)).argmax(-1)
        return tokens if self._row_is_sampled is None else tokens.where(self._row_is_sampled, scores.argmax(-1))


def waiting_times(rows: Sequence[Row], probabilities: Tensor) -> Tensor:
    """Random numbers as many as `probabilities` [B, n], exponentially distributed, each row's by its generator."""
    times = torch.empty_like(probabilities)
    if all(row.generator is rows[0].generator for row in rows):
        return times.exponential_(generator=rows[0].generator)
    for row, own in zip(rows, times, strict=True):
        own.exponential_(generator=row.generator)
    return times


def log_probabilities(scores: Tensor, tokens: Tensor) -> Tensor:
    """Log probabilities [B] of tokens [B], of the distribution with these scores [B, V]."""
    return scores.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _groups(chains: Iterable[list[Processor]], device: torch.device) -> Groups:
    """Rows with equal chains, in groups; rows without processors are in none."""
    found: list[tuple[list[int], list[Processor]]] = []
    for row, chain in enumerate(chains):
        rows = next((rows for rows, known in found if known == chain), None)
        if rows is None:
            found.append(([row], chain))
        else:
            rows.append(row)
    if len(found) == 1:
        return [(None, found[0][1])] if found[0][1] else []
    return [(on_device(rows, device), chain) for rows, chain in found if chain]


def _applied(groups: Groups, history: Tensor, scores: Tensor) -> Tensor:
    for rows, chain in groups:
        if rows is None:
            scores = processed(chain, history, scores)
        else:
            scores = scores.index_copy(0, rows, processed(chain, history[rows], scores[rows]))
    return scores
