"""Options of one generation, checked before it begins."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
from torch import Tensor

from ..errors import ArgumentError, shown
from .processors import MinP, Processor, RepetitionPenalty, Temperature, TopK, TopP, check_number, is_finite

UNLIMITED_TOKENS = 2**62
"""Maximum length, in tokens, that means no limit. It leaves room for sums in int64."""

MAX_RETURN_SEQUENCES = 2**24
"""Upper limit of the rows that one row of the prompt becomes."""

_COUNTS = ("num_beams", "num_return_sequences")
"""Options that cannot be None."""

UseCache = bool | Literal["auto"]


class GenerationKeywords(TypedDict, total=False):
    """The options of one generation, as keywords; `GenerationOptions` documents them and has the defaults."""

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
    """Options of generation: the number of tokens, the choice of each token, and the end of a row.

    Args:
        max_new_tokens: maximum number of new tokens of a row.
        max_length: maximum number of tokens of a row, with its prompt. Give one of the two.
        temperature: 0 takes the most probable token (greedy), a greater value samples.
        top_k, top_p, min_p: restrict the tokens that are sampled from; applied in this order, after the temperature.
            `top_k=0`, `top_p=1` and `min_p=0` are off.
        repetition_penalty: a value above 1 lowers the probability of tokens in the row's prompt of this call and in
            its new tokens. Tokens of earlier turns, which only the caches contain, are not penalised. 0 and 1 are off.
        processors: additional callables, applied before the options above: `processor(input_ids [B, n], scores [B, V])`
            gives scores. The logits processors of transformers can be used.
        stop_tokens: ids that end a row, and are part of it.
        stop_sequences: sequences of ids that end a row, and are part of it.
        pad_token: id that fills finished rows; default: the first stop token, else 0.
        num_beams: a value above 1 gives beam search with this number of candidates per row.
        length_penalty: exponent of the length by which a candidate's log probability is divided.
        num_return_sequences: samples, or best candidates, per row of the prompt.
        prefill_chunk: tokens of the prompt that are read at a time; fewer need less memory, the result is the same.
        use_cache: True, False, or "auto", which uses the model's own conversation if its caches are on, and else
            temporary caches if more than one new token is possible (docs/performance.md has measurements).
        generator: random generator for sampling; equal seeds give equal tokens.

    Raises ArgumentError, with the name of the option, for invalid values.
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
        if self.num_return_sequences > MAX_RETURN_SEQUENCES:
            got = shown(self.num_return_sequences)
            raise ArgumentError(f"num_return_sequences: expected at most {MAX_RETURN_SEQUENCES:,}, got {got}")
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
            raise ArgumentError(f"generator: expected a torch.Generator or None, got {shown(self.generator)}")
        for processor in self.processors:
            if not callable(processor):
                raise ArgumentError(f"processors: expected callables, got {shown(processor)}")
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
                f"num_return_sequences: expected at most num_beams={shown(most)} without sampling, "
                f"got {shown(self.num_return_sequences)}"
            )
        self.chain()

    def chain(self) -> list[Processor]:
        """All processors, in order."""
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
        """Raises ArgumentError if these options do not allow a stream of tokens."""
        if self.num_beams > 1:
            raise ArgumentError(
                f"num_beams: expected 1, since the best candidate is known only at the end, "
                f"got {self.num_beams}; use generate"
            )

    def limits(self, prompt_lengths: Sequence[int]) -> list[int]:
        """The maximum number of new tokens of each row. Raises ArgumentError if a prompt has `max_length` tokens."""
        if self.max_new_tokens is not None:
            return [min(self.max_new_tokens, UNLIMITED_TOKENS)] * len(prompt_lengths)
        most = min(self.max_length or 0, UNLIMITED_TOKENS)
        if max(prompt_lengths) >= most:
            raise ArgumentError(
                f"max_length: expected more than the {max(prompt_lengths)} tokens of the longest prompt, got {most}"
            )
        return [most - length for length in prompt_lengths]

    @property
    def padding(self) -> int:
        """The id that fills finished rows."""
        if self.pad_token is not None:
            return self.pad_token
        return self.stop_tokens[0] if self.stop_tokens else 0

    @property
    def needs_tokens(self) -> bool:
        """True if the host must know the tokens of a step before it begins the next one."""
        return bool(self.stop_tokens or self.stop_sequences or self.processors)

    def ends(self, row: Sequence[int]) -> bool:
        """True if the last new tokens of a row end it."""
        if row[-1] in self.stop_tokens:
            return True
        return any(list(row[-len(sequence) :]) == list(sequence) for sequence in self.stop_sequences)

    def take(self, logits: Tensor) -> Tensor:
        """A token for each row of processed logits [B, V]: int64 [B]."""
        if not self.temperature:
            return logits.argmax(-1)
        probabilities = logits.softmax(-1)
        # What `multinomial` draws by, with the same numbers of the generator, but without its two looks at the device.
        waiting_times = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return (probabilities / waiting_times).argmax(-1)


def _is_on(value: object) -> bool:
    """True for every value except the number 0. A value that is not a number counts as on, and is then refused."""
    return isinstance(value, bool) or not isinstance(value, int | float) or value != 0


def _is_use_cache(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value == "auto")


def _are_ids(sequence: object) -> bool:
    return isinstance(sequence, Sequence) and len(sequence) > 0 and all(map(_is_id, sequence))


def _is_id(token: object) -> bool:
    """True for an int that can be a token id, within the range of int64."""
    return type(token) is int and 0 <= token < 2**63
