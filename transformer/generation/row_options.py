"""Options of one row: how its tokens are chosen, and what ends it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import ArgumentError, shown
from .constraints import AllowedTokens, PrefixAllowedTokens, SequenceBias, SequenceBiases
from .filters import TypicalP
from .penalties import FrequencyPenalty, NoRepeatNGram, PresencePenalty
from .processors import MinP, Processor, RepetitionPenalty, Temperature, TopK, TopP, are_ids, check_number, is_id

UNLIMITED_TOKENS = 2**62
"""Maximum length, in tokens, that means no limit. It leaves room for sums in int64."""

MAX_SEED = 2**62
"""Upper limit of a seed; the seeds of copies, which follow it, are still seeds of a random generator."""

Criterion = Callable[[Tensor, Tensor], bool | Tensor]
"""`criterion(input_ids [rows, n], scores [rows, V])` says whether rows end: bool for all, or bool [rows]."""


@runtime_checkable
class TextDecoder(Protocol):
    """A tokenizer, for what text tokens are: this library's, and those of transformers."""

    def decode(self, tokens: Sequence[int], /) -> str:
        """The text of tokens."""


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Options of one row of a generation; `GenerationOptions` documents them.

    Raises ArgumentError, with the name of the option, for invalid values.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    sequence_bias: SequenceBiases | None = None
    bad_words_ids: Sequence[Sequence[int]] = ()
    prefix_allowed_tokens_fn: AllowedTokens | None = None
    processors: Sequence[Processor] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[str, ...] = ()
    stop_across_prompt: bool = False
    tokenizer: TextDecoder | None = None
    seed: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens"):
            least, value = (1 if name == "max_new_tokens" else 0), getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ArgumentError(f"{name}: expected a whole number (int) of at least {least}, got {shown(value)}")
        if (self.min_new_tokens or 0) > (self.max_new_tokens or UNLIMITED_TOKENS):
            raise ArgumentError(
                f"min_new_tokens: expected at most max_new_tokens={shown(self.max_new_tokens)}, "
                f"got {shown(self.min_new_tokens)}"
            )
        check_number("temperature", self.temperature, above=0.0, or_zero=True)
        if self.repetition_penalty is not None:
            check_number("repetition_penalty", self.repetition_penalty, above=0.0, or_zero=True)
        if self.min_p is not None:
            check_number("min_p", self.min_p, above=0.0, most=1.0, or_zero=True)
        if self.top_k is not None and is_on(self.top_k) and (type(self.top_k) is not int or self.top_k < 0):
            raise ArgumentError(f"top_k: expected a whole number (int) of at least 0, got {shown(self.top_k)}")
        if self.seed is not None and not (is_id(self.seed) and self.seed <= MAX_SEED):
            raise ArgumentError(f"seed: expected a whole number (int) from 0 to 2**62, got {shown(self.seed)}")
        if not isinstance(self.generator, torch.Generator | None):
            raise ArgumentError(f"generator: expected a torch.Generator or None, got {shown(self.generator)}")
        if self.generator is not None and self.seed is not None:
            raise ArgumentError(f"seed, generator: expected one of the two, got both, seed={self.seed}")
        for processor in self.processors:
            if not callable(processor):
                raise ArgumentError(f"processors: expected callables, got {shown(processor)}")
        self._check_tokens()
        # Their processors check the other options.
        _ = self.scoring, self.sampling()

    def _check_tokens(self) -> None:
        forced = *self.forced_eos_token_id, *(() if self.forced_bos_token_id is None else (self.forced_bos_token_id,))
        for names, tokens in (
            ("stop_tokens", self.stop_tokens),
            ("forced_bos_token_id, forced_eos_token_id", forced),
        ):
            for token in tokens:
                if not is_id(token):
                    raise ArgumentError(f"{names}: expected ids (int) from 0 on, got {shown(token)}")
        sequences: Sequence[object] = self.stop_sequences
        for sequence in sequences:
            if not (isinstance(sequence, tuple) and sequence and all(map(is_id, sequence))):
                raise ArgumentError(
                    f"stop_sequences: expected sequences of at least one id (int) each, got {shown(sequence)}"
                )
        words: object = self.bad_words_ids
        if not isinstance(words, Sequence) or not all(map(are_ids, words)):
            raise ArgumentError(
                f"bad_words_ids: expected a list of sequences of at least one id (int) each, got {shown(words)}"
            )
        texts: Sequence[object] = self.stop_strings
        for text in texts:
            if not isinstance(text, str) or not text:
                raise ArgumentError(f"stop_strings: expected texts of at least one character, got {shown(text)}")
        if not isinstance(self.stop_across_prompt, bool):
            raise ArgumentError(f"stop_across_prompt: expected True or False, got {shown(self.stop_across_prompt)}")
        needed = self.tokenizer is not None or self.stop_strings
        if needed and not isinstance(self.tokenizer, TextDecoder):
            raise ArgumentError(
                "tokenizer: expected a tokenizer, with decode(tokens), beside stop_strings, "
                f"got {shown(self.tokenizer)}"
            )

    @cached_property
    def scoring(self) -> list[Processor]:
        """The processors by options, in order, that tokens are chosen with in all strategies."""
        chain: list[Processor] = []
        if self.sequence_bias is not None:
            chain.append(SequenceBias(self.sequence_bias))
        if self.repetition_penalty is not None and is_on(self.repetition_penalty):
            chain.append(RepetitionPenalty(self.repetition_penalty))
        if self.presence_penalty is not None and is_on(self.presence_penalty):
            chain.append(PresencePenalty(self.presence_penalty))
        if self.frequency_penalty is not None and is_on(self.frequency_penalty):
            chain.append(FrequencyPenalty(self.frequency_penalty))
        if self.no_repeat_ngram_size is not None and is_on(self.no_repeat_ngram_size):
            chain.append(NoRepeatNGram(self.no_repeat_ngram_size))
        # A stop token alone is no word, as in transformers.
        words = [word for word in self.bad_words_ids if len(word) > 1 or word[0] not in self.stop_tokens]
        if words:
            chain.append(SequenceBias([(word, -math.inf) for word in words]))
        if self.prefix_allowed_tokens_fn is not None:
            chain.append(PrefixAllowedTokens(self.prefix_allowed_tokens_fn))
        return chain

    @property
    def excludes_tokens(self) -> bool:
        """True if processors of `scoring` exclude tokens."""
        return any(isinstance(each, NoRepeatNGram | SequenceBias | PrefixAllowedTokens) for each in self.scoring)

    def sampling(self) -> list[Processor]:
        """The processors, in order, that make the distribution that tokens are sampled from."""
        chain: list[Processor] = [Temperature(self.temperature)] if self.temperature else []
        if self.top_k is not None and is_on(self.top_k):
            chain.append(TopK(self.top_k))
        if self.top_p is not None:
            chain.append(TopP(self.top_p))
        if self.min_p is not None and is_on(self.min_p):
            chain.append(MinP(self.min_p))
        if self.typical_p is not None:
            chain.append(TypicalP(self.typical_p))
        return chain if self.temperature else []

    @property
    def has_stops(self) -> bool:
        """True if tokens can end the row before its limit."""
        return bool(self.stop_tokens or self.stop_sequences or self.stop_strings)

    @property
    def reads_prompt(self) -> bool:
        """True if the host must know the tokens of the row's prompt."""
        return bool(self.stop_across_prompt and self.stop_strings)


def is_on(value: object) -> bool:
    """True for every value except the number 0. A value that is not a number counts as on, and is then refused."""
    return isinstance(value, bool) or not isinstance(value, int | float) or value != 0
