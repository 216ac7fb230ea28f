"""Options of a generation: all those of one call, checked before any work begins."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
from torch import Tensor

from ..errors import ArgumentError
from .processors import MinP, Processor, RepetitionPenalty, Temperature, TopK, TopP, check_number, is_finite, shown

MOST_TOKENS = 2**62
"""Tokens that stand for any number of them."""

MOST_COPIES = 2**24
"""Rows that one prompt may become."""

_COUNTS = ("num_beams", "num_return_sequences")
"""Numbers of which None is no value."""

UseCache = bool | Literal["auto"]


class GenerationKeywords(TypedDict, total=False):
    """The options of one generation, as keywords; `GenerationOptions` says what they mean, and has the defaults."""

    max_new_tokens: int | None
    max_length: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    processors: Sequence[Processor]
    stop_tokens: Sequence[int]
    stop_sequences: Sequence[Sequence[int]]
    pad_token: int | None
    num_beams: int
    length_penalty: float
    num_return_sequences: int
    prefill_chunk: int | None
    use_cache: UseCache
    generator: torch.Generator | None


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How many tokens, how each is chosen, and when a row is done.

    Args:
        max_new_tokens: most new tokens of a row; or
        max_length: most tokens of a row in all, its prompt included. One of the two is needed.
        temperature: 0 takes the likeliest token (greedy), anything above it samples.
        top_k, top_p, min_p: what is sampled from; applied in this order, after the temperature. `top_k=0`, `top_p=1`
            and `min_p=0` are off.
        repetition_penalty: above 1 makes tokens less likely that stand in the row's prompt of this call, or after it;
            of earlier turns of a conversation only the caches know. 0 and 1 are off.
        processors: callables of one's own, applied before all of these: `processor(input_ids [B, n], scores [B, V])`
            gives scores. Those of transformers fit.
        stop_tokens: ids that end a row; they belong to it.
        stop_sequences: sequences of ids that end a row.
        pad_token: what follows in rows that are done; by default the first stop token, else 0.
        num_beams: above 1 searches for the likeliest whole sequence, over so many candidates per row.
        length_penalty: exponent of the length that a candidate's log probability is divided by.
        num_return_sequences: samples, or best candidates, per row of the prompt.
        prefill_chunk: reads the prompt so many tokens at a time; the result is the same, memory is less.
        use_cache: True, False, or "auto": the conversation that is in the model where there may be one, else caches
            wherever more than one token may be asked for, as they then always pay (docs/performance.md has the curve).
        generator: the random generator of sampling; equal seeds give equal tokens.

    Raises ArgumentError, naming the option, for values that have no meaning.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    processors: Sequence[Processor] = ()
    stop_tokens: Sequence[int] = ()
    stop_sequences: Sequence[Sequence[int]] = ()
    pad_token: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    prefill_chunk: int | None = None
    use_cache: UseCache = True
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.max_new_tokens is None) == (self.max_length is None):
            raise ArgumentError(
                f"max_new_tokens, max_length: expected one of the two, got {shown(self.max_new_tokens)} and "
                f"{shown(self.max_length)}"
            )
        for name in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences", "prefill_chunk"):
            value = getattr(self, name)
            if (value is not None or name in _COUNTS) and (type(value) is not int or value < 1):
                raise ArgumentError(f"{name}: expected a whole number (int) of at least 1, got {shown(value)}")
        if self.num_return_sequences > MOST_COPIES:
            raise ArgumentError(
                f"num_return_sequences: expected at most {MOST_COPIES:,}, got {shown(self.num_return_sequences)}"
            )
        check_number("temperature", self.temperature, above=0.0, or_zero=True)
        if self.repetition_penalty is not None:
            check_number("repetition_penalty", self.repetition_penalty, above=0.0, or_zero=True)
        if self.min_p is not None:
            check_number("min_p", self.min_p, above=0.0, most=1.0, or_zero=True)
        if self.top_k is not None and _is_on(self.top_k) and (type(self.top_k) is not int or self.top_k < 0):
            raise ArgumentError(f"top_k: expected a whole number (int) of at least 0, got {shown(self.top_k)}")
        if not is_finite(self.length_penalty):
            raise ArgumentError(f"length_penalty: expected a finite number, got {shown(self.length_penalty)}")
        if not _is_use_cache(self.use_cache):
            raise ArgumentError(f'use_cache: expected True, False or "auto", got {shown(self.use_cache)}')
        for name in ("processors", "stop_tokens", "stop_sequences"):
            if not isinstance(getattr(self, name), Sequence):
                raise ArgumentError(f"{name}: expected a list or tuple, got {shown(getattr(self, name))}")
        if not isinstance(self.generator, torch.Generator | None):
            raise ArgumentError(f"generator: expected a torch.Generator or None, got {self.generator!r}")
        for processor in self.processors:
            if not callable(processor):
                raise ArgumentError(f"processors: expected callables, got {processor!r}")
        for token in (*self.stop_tokens, *(() if self.pad_token is None else (self.pad_token,))):
            if not _is_id(token):
                raise ArgumentError(f"stop_tokens, pad_token: expected ids (int) from 0 on, got {shown(token)}")
        for sequence in self.stop_sequences:
            if not _are_ids(sequence):
                raise ArgumentError(
                    f"stop_sequences: expected sequences of at least one id (int) each, got {shown(sequence)}"
                )
        if self.num_beams > 1 and self.temperature:
            raise ArgumentError(
                f"temperature: expected 0 with num_beams={shown(self.num_beams)}, got {shown(self.temperature)}"
            )
        most = self.num_beams if self.num_beams > 1 or not self.temperature else None
        if most is not None and self.num_return_sequences > most:
            raise ArgumentError(
                f"num_return_sequences: expected at most num_beams={shown(most)} where nothing is sampled, "
                f"got {shown(self.num_return_sequences)}"
            )
        self.chain()

    def chain(self) -> list[Processor]:
        """Every processor, in order."""
        chain = list(self.processors)
        if self.repetition_penalty is not None and _is_on(self.repetition_penalty):
            chain.append(RepetitionPenalty(self.repetition_penalty))
        sampling: list[Processor] = [Temperature(self.temperature)] if self.temperature else []
        if self.top_k is not None and _is_on(self.top_k):
            sampling.append(TopK(self.top_k))
        if self.top_p is not None:
            sampling.append(TopP(self.top_p))
        if self.min_p is not None and _is_on(self.min_p):
            sampling.append(MinP(self.min_p))
        return chain + (sampling if self.temperature else [])

    def check_streams(self) -> None:
        """Raises ArgumentError where tokens cannot be given as they come."""
        if self.num_beams > 1:
            raise ArgumentError(
                f"num_beams: expected 1, since the best of several candidates is known at the end only, "
                f"got {self.num_beams}; use generate"
            )

    def limits(self, prompt_lengths: Sequence[int]) -> list[int]:
        """The most new tokens of each row. Raises ArgumentError where a prompt is as long as `max_length` already."""
        if self.max_new_tokens is not None:
            return [min(self.max_new_tokens, MOST_TOKENS)] * len(prompt_lengths)
        most = min(self.max_length or 0, MOST_TOKENS)
        if max(prompt_lengths) >= most:
            raise ArgumentError(
                f"max_length: expected more than the {max(prompt_lengths)} tokens of the longest prompt, got {most}"
            )
        return [most - length for length in prompt_lengths]

    @property
    def padding(self) -> int:
        """What follows in rows that are done."""
        if self.pad_token is not None:
            return self.pad_token
        return self.stop_tokens[0] if self.stop_tokens else 0

    def ends(self, row: Sequence[int]) -> bool:
        """Whether the last of a row's new tokens end it."""
        if row[-1] in self.stop_tokens:
            return True
        return any(list(row[-len(sequence) :]) == list(sequence) for sequence in self.stop_sequences)

    def take(self, logits: Tensor) -> Tensor:
        """A token for each row of processed logits [B, V]: int64 [B]."""
        if not self.temperature:
            return logits.argmax(-1)
        return logits.softmax(-1).multinomial(1, generator=self.generator).squeeze(-1)


def _is_on(value: object) -> bool:
    """Whether a number is not 0; what is no number is on, and then refused by its name."""
    return isinstance(value, bool) or not isinstance(value, int | float) or value != 0


def _is_use_cache(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value == "auto")


def _are_ids(sequence: object) -> bool:
    return isinstance(sequence, Sequence) and len(sequence) > 0 and all(map(_is_id, sequence))


def _is_id(token: object) -> bool:
    """Whether it may be a token's id: one that a tensor can hold."""
    return type(token) is int and 0 <= token < 2**63
