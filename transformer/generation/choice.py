"""Choice of the next token of each row from the model's logits, and its log probability."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import KnownMask, on_device
from .edges import Edges
from .history import History
from .processors import Processor, processed
from .rows import Row


class Group(NamedTuple):
    """Processors of some of the rows."""

    rows: list[int] | None
    """None: all rows."""
    row_index: Tensor
    """The rows, int64 on the device."""
    chain: Sequence[Processor]


class Choice:
    """Choice of the next token of rows, each with options of its own.

    Rows with equal processors go through them together: those of options that change scores, then forced and excluded
    tokens, then those of the user, then those of sampling, as in transformers. A row with a seed is sampled by its own
    random generator.

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
        self._scoring = _groups([row.options.scoring for row in rows], device)
        self._edges = Edges(rows) if Edges.are_needed(rows) else None
        self._of_user = _groups([row.options.processors for row in rows], device)
        self._sampling = _groups(chains, device)
        self.changes_scores = bool(self._scoring or self._edges or self._of_user or self._sampling)
        """False if the scores are the logits."""
        self.excludes_tokens = bool(self._edges) or any(row.options.excludes_tokens for row in rows)
        """True if options of a row can exclude all tokens."""
        self._sampled = [bool(row.options.temperature) for row in rows]
        self._row_is_sampled: Tensor | None = None
        if any(self._sampled) and not all(self._sampled):
            self._row_is_sampled = torch.tensor(self._sampled, device="cpu").to(device, non_blocking=True)

    def scores(self, tokens: Tensor, logits: Tensor, new: int | Sequence[int], live: KnownMask | None = None) -> Tensor:
        """The scores [B, V] of tokens after processors and options: -inf for tokens that are excluded.

        Args:
            tokens: the tokens of each row so far, int64 [B, n], as processors see them.
            logits: [B, V].
            new: how many of the tokens are new, in each row.
            live: bool [B, 1], true for rows that get a token; None: all do.

        Raises as `processed` does.
        """
        counts = [new] * len(self.rows) if isinstance(new, int) else new
        history = History(
            tokens,
            [row.prompt_length + count for row, count in zip(self.rows, counts, strict=True)],
            counts,
            None if live is None else live.on_host.flatten().tolist(),
            [row.number for row in self.rows],
        )
        logits = _applied(self._scoring, history, logits)
        if self._edges is not None:
            logits = self._edges(logits, counts)
        logits = _applied(self._of_user, history, logits)
        return _applied(self._sampling, history, logits)

    def take(self, scores: Tensor, times: Tensor | None = None) -> Tensor:
        """A token for each row of scores [B, V]: int64 [B]; the most probable one in rows without a temperature.

        `times`: the waiting times [B, V] to sample by; None: they are drawn.
        """
        if not any(self._sampled):
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        # What `multinomial` draws by, with the same numbers of the generator, but without its two looks at the device.
        times = waiting_times(self.rows, probabilities) if times is None else times
        tokens = (probabilities / times).argmax(-1)
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


def _groups(chains: Iterable[Sequence[Processor]], device: torch.device) -> list[Group]:
    """Rows with equal chains, in groups; rows without processors are in none."""
    found: list[tuple[list[int], Sequence[Processor]]] = []
    for row, chain in enumerate(chains):
        rows = next((rows for rows, known in found if known == chain), None)
        if rows is None:
            found.append(([row], chain))
        else:
            rows.append(row)
    return [Group(None if len(found) == 1 else rows, on_device(rows, device), chain) for rows, chain in found if chain]


def _applied(groups: Sequence[Group], history: History, scores: Tensor) -> Tensor:
    for rows, index, chain in groups:
        if rows is None:
            scores = processed(chain, history, scores)
        else:
            scores = scores.index_copy(0, index, processed(chain, history.rows(rows, index), scores[index]))
    return scores
