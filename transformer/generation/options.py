"""Options of one generation, checked before it begins."""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import torch
from torch import nn

from ..deprecation import warn_old
from ..errors import ArgumentError, shown
from .constraints import AllowedTokens, SequenceBiases
from .guess_options import check_guesses
from .option_types import EarlyStopping, UseCache
from .per_row import checked_rows, row_options
from .prefill import PromptProgress
from .processors import Processor, check_count, check_number, is_finite, is_id
from .row_options import UNLIMITED_TOKENS, Criterion, RowOptions, TextDecoder

MAX_RETURN_SEQUENCES = 2**24
"""Upper limit of the rows that one row of the prompt becomes."""

_COUNTS = ("num_beams", "num_return_sequences", "num_assistant_tokens", "max_matching_ngram_size")
"""Options that cannot be None."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of generation: the number of tokens, the choice of each token, and the end of a row.

    Options "of a row" are one value for all rows of the prompt, or a list or tuple with one value for each row.

    Args:
        max_new_tokens: maximum number of new tokens of a row; an option of a row.
        max_length: maximum number of tokens of a row, with its prompt. Give one of the two.
        min_new_tokens: the first new tokens, as many as this, do not end a row: stop tokens are excluded, sequences
            and strings that are complete by then do not count.
        max_time: seconds, after which the token that is being chosen is the last one of all rows.
        temperature: 0 takes the most probable token (greedy), a greater value samples; an option of a row.
        top_k, top_p, min_p, typical_p: restrict the tokens that are sampled from; applied in this order, after the
            temperature. `top_k=0`, `top_p=1`, `min_p=0` and `typical_p=1` are off. Options of a row.
        repetition_penalty: a value above 1 lowers the probability of tokens in the row's prompt of this call and in
            its new tokens. Tokens of earlier turns, which only the caches contain, are not penalised. 0 and 1 are off.
            An option of a row.
        presence_penalty, frequency_penalty: lower the score of a token that was generated in the row by this number,
            once or for each time; numbers below 0 raise it. Tokens of the prompt do not count. Options of a row.
        no_repeat_ngram_size: tokens that would complete a sequence of so many tokens that is in the row, prompt
            included, are excluded; 0 is off. An option of a row.
        sequence_bias: `{(id, ...): bias}`, or pairs `[[id, ...], bias]`: added to the score of a token that would
            complete the sequence; -inf excludes it.
        bad_words_ids: sequences of ids that are not generated. A stop token alone does not count, as in transformers.
        prefix_allowed_tokens_fn: function that gives the ids that may follow, called for each row that goes on as
            `allowed(number, ids int64 [n])` with the number of the row (beams have that of their row).
        processors: additional callables, applied after the options that change scores and before the temperature:
            `processor(input_ids [B, n], scores [B, V])` gives scores. The logits processors of transformers, and those
            of this package (`XTC`, `DRY`), can be used.
        forced_bos_token_id: id of the first new token, where the prompt of a row is a single token, such as the start
            token of an encoder-decoder.
        forced_eos_token_id: id, or one of some ids, of the last token of a row that reaches its maximum length.
        stop_tokens: ids that end a row, and are part of it; or a list of ids for each row.
        stop_sequences: sequences of ids that end a row, and are part of it; or a list of sequences for each row.
        stop_strings: a text or several that end a row with the token that completes one; or a list of texts for each
            row. A text may begin and end inside of tokens. It needs the `tokenizer`.
        stop_across_prompt: True if a stop string may begin in the row's prompt of this call.
        tokenizer: the tokenizer of the model: `decode(ids)` gives their text.
        stopping_criteria: callables that end rows: `criterion(input_ids [rows, n], scores [rows, V])`, of their tokens
            so far and the scores that the last one was chosen from, gives a bool for all rows, or bool [rows]. The
            stopping criteria of transformers can be used.
        pad_token: id that fills finished rows; default: the first stop token, else 0.
        num_beams: a value above 1 gives beam search with this number of candidates per row. With a temperature above 0
            the candidates are sampled.
        length_penalty: exponent of the length by which a candidate's log probability is divided.
        early_stopping: end of a beam search. "never" looks until no candidate can become better; False until none can
            by its score now, which is not always right for a `length_penalty` above 0; True until `num_beams`
            candidates have ended.
        renormalize_logits: whether the probabilities of a beam search sum to 1 again after tokens were excluded and
            scores changed. Without beams it changes nothing.
        num_return_sequences: samples, or best candidates, per row of the prompt.
        assistant_model: a smaller model of the same vocabulary that guesses tokens, of which the model
            checks several at a time; the tokens are those without it (arXiv 2211.17192). It has caches of its own for
            this call; if its caches are on, they begin with its conversation, which stays as it is.
        num_assistant_tokens: tokens that it guesses at a time.
        prompt_lookup_num_tokens: tokens that are guessed at a time by what followed the last tokens of a row earlier in
            the row, in its prompt of this call or its new tokens; None is off.
        max_matching_ngram_size: the most tokens that are looked for; the longest sequence that is found counts.
        bidirectional_prompt: whether the tokens of a prompt see each other in both directions (prefix LM), in a model
            whose forward takes `prefix_lengths`. Such a prompt begins the conversation and is read in one call.
        prefill_chunk_size: columns of the prompt that are read at a time; fewer need less memory, and the result is the
            same. None: at most 2,048 tokens of all rows; the whole prompt where caches have a `cache_budget`, which is
            applied after each chunk otherwise, and where there are no caches. Deprecated name: `prefill_chunk`.
        prompt_progress_callback: called with the columns of the prompt that were read and with all: with 0 at first,
            and after each chunk. What it raises ends the generation.
        use_cache: True, False, or "auto", which uses the model's own conversation if its caches are on, and else
            temporary caches if more than one new token is possible (docs/performance.md has measurements).
        seed: seed of a random generator of each row, so that its sample does not depend on other rows: equal rows with
            one seed give equal samples. Copy `i` of `num_return_sequences`, from 0 on, has `seed + i`. An option of a
            row.
        generator: random generator of all rows together, instead of seeds; equal seeds give equal tokens.

    Raises ArgumentError, with the name of the option, for invalid values.
    """

    max_new_tokens: int | Sequence[int] | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    max_time: float | None = None
    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int | None] | None = None
    top_p: float | Sequence[float | None] | None = None
    min_p: float | Sequence[float | None] | None = None
    typical_p: float | Sequence[float | None] | None = None
    repetition_penalty: float | Sequence[float | None] | None = None
    presence_penalty: float | Sequence[float | None] | None = None
    frequency_penalty: float | Sequence[float | None] | None = None
    no_repeat_ngram_size: int | Sequence[int | None] | None = None
    sequence_bias: SequenceBiases | None = None
    bad_words_ids: Sequence[Sequence[int]] = ()
    prefix_allowed_tokens_fn: AllowedTokens | None = None
    processors: Sequence[Processor] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = ()
    stop_sequences: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]] = ()
    stop_strings: str | Sequence[str] | Sequence[Sequence[str]] = ()
    stop_across_prompt: bool = False
    tokenizer: TextDecoder | None = None
    stopping_criteria: Sequence[Criterion] = ()
    pad_token: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "never"
    renormalize_logits: bool = False
    num_return_sequences: int = 1
    assistant_model: nn.Module | None = None
    num_assistant_tokens: int = 5
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    bidirectional_prompt: bool = False
    prefill_chunk_size: int | None = None
    prompt_progress_callback: PromptProgress | None = None
    use_cache: UseCache = True
    seed: int | Sequence[int | None] | None = None
    generator: torch.Generator | None = field(default=None, repr=False)
    prefill_chunk: InitVar[int | None] = None

    def __post_init__(self, prefill_chunk: int | None) -> None:
        if prefill_chunk is not None:
            warn_old("prefill_chunk", "prefill_chunk_size")
            object.__setattr__(self, "prefill_chunk_size", prefill_chunk)
        if (self.max_new_tokens is None) == (self.max_length is None):
            raise ArgumentError(
                f"max_new_tokens, max_length: expected one of the two, got {shown(self.max_new_tokens)} and "
                f"{shown(self.max_length)}"
            )
        for name in ("max_length", "prefill_chunk_size", "prompt_lookup_num_tokens", *_COUNTS):
            value = getattr(self, name)
            if value is not None or name in _COUNTS:
                check_count(name, value)
        if self.num_return_sequences > MAX_RETURN_SEQUENCES:
            got = shown(self.num_return_sequences)
            raise ArgumentError(f"num_return_sequences: expected at most {MAX_RETURN_SEQUENCES:,}, got {got}")
        if self.max_time is not None:
            check_number("max_time", self.max_time, above=0.0)
        if not is_finite(self.length_penalty):
            raise ArgumentError(f"length_penalty: expected a finite number, got {shown(self.length_penalty)}")
        if not isinstance(self.bidirectional_prompt, bool):
            raise ArgumentError(f"bidirectional_prompt: expected True or False, got {shown(self.bidirectional_prompt)}")
        for name, word in (("use_cache", "auto"), ("early_stopping", "never")):
            value = getattr(self, name)
            if not (isinstance(value, bool) or (isinstance(value, str) and value == word)):
                raise ArgumentError(f'{name}: expected True, False or "{word}", got {shown(value)}')
        if not isinstance(self.renormalize_logits, bool):
            raise ArgumentError(f"renormalize_logits: expected True or False, got {shown(self.renormalize_logits)}")
        for name in ("processors", "stopping_criteria", "stop_tokens", "stop_sequences", "bad_words_ids"):
            if not isinstance(getattr(self, name), Sequence):
                raise ArgumentError(f"{name}: expected a list or tuple, got {shown(getattr(self, name))}")
        progress: object = self.prompt_progress_callback
        if progress is not None and not callable(progress):
            raise ArgumentError(f"prompt_progress_callback: expected a callable or None, got {shown(progress)}")
        for criterion in self.stopping_criteria:
            if not callable(criterion):
                raise ArgumentError(f"stopping_criteria: expected callables, got {shown(criterion)}")
        if self.pad_token is not None and not is_id(self.pad_token):
            raise ArgumentError(f"stop_tokens, pad_token: expected ids (int) from 0 on, got {shown(self.pad_token)}")
        check_guesses(self.assistant_model, self.prompt_lookup_num_tokens, self.num_beams, self.use_cache)
        rows = checked_rows(vars(self))
        greedy = not all(row.temperature for row in rows)
        most = self.num_beams if self.num_beams > 1 or greedy else None
        if most is not None and self.num_return_sequences > most:
            raise ArgumentError(
                f"num_return_sequences: expected at most num_beams={shown(most)} without sampling, "
                f"got {shown(self.num_return_sequences)}"
            )
        if self.num_beams > 1 and greedy and any(row.temperature for row in rows):
            raise ArgumentError(
                f"temperature: expected 0 for all rows, or for none, with num_beams={self.num_beams}, "
                f"got {shown(self.temperature)}"
            )

    @property
    def speculates(self) -> bool:
        """True if tokens are guessed, and several checked at a time."""
        return self.assistant_model is not None or self.prompt_lookup_num_tokens is not None

    @property
    def most_guesses(self) -> int:
        """The most tokens of a row that are guessed at a time."""
        return self.prompt_lookup_num_tokens or self.num_assistant_tokens

    def rows(self, batch: int) -> list[RowOptions]:
        """The options of each of the `batch` rows of a prompt.

        Raises ArgumentError, with the option, if one has values for another number of rows.
        """
        return row_options(vars(self), batch)

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
            return [min(row.max_new_tokens or 0, UNLIMITED_TOKENS) for row in self.rows(len(prompt_lengths))]
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
        return next((token for row in checked_rows(vars(self)) for token in row.stop_tokens), 0)
