"""Rows of one generation: each with options of its own, its prompt, and its random generator."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .options import GenerationOptions
from .prompt import Prompt
from .row_options import RowOptions


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a generation."""

    options: RowOptions
    prompt_length: int
    """Real tokens of its prompt."""
    limit: int
    """Maximum number of new tokens."""
    generator: torch.Generator | None
    """Random generator of its samples; rows may share one, and None is PyTorch's own."""
    prompt: tuple[int, ...] = ()
    """The tokens of its prompt, where a stop string may begin in them."""

    @classmethod
    def of(cls, options: RowOptions, prompt: Tensor, limit: int, copy: int = 0) -> "Row":
        """A row after a prompt, int64 [L]. `copy`: which of several samples of one prompt it is, from 0 on."""
        generator = options.generator
        if options.seed is not None and options.temperature:
            generator = torch.Generator(prompt.device).manual_seed(options.seed + copy)
        tokens = tuple(prompt.tolist()) if options.stop_across_prompt and options.stop_strings else ()
        return cls(options, prompt.shape[0], limit, generator, tokens)

    def forced_tokens(self, new: int) -> tuple[int, ...]:
        """The tokens of which one has to follow `new` new tokens; none: all may follow."""
        options = self.options
        if options.forced_eos_token_id and new == self.limit - 1:
            return options.forced_eos_token_id
        if options.forced_bos_token_id is not None and self.prompt_length + new == 1:
            return (options.forced_bos_token_id,)
        return ()

    def excluded_tokens(self, new: int) -> tuple[int, ...]:
        """The tokens that must not follow `new` new tokens, because they would end the row."""
        return self.options.stop_tokens if new < (self.options.min_new_tokens or 0) else ()


def rows_of(options: GenerationOptions, prompt: Prompt) -> list[Row]:
    """The rows of a prompt, each as often as `num_return_sequences`.

    Raises ArgumentError, with the option, for values of another number of rows, and for a prompt beyond `max_length`.
    """
    lengths, width = prompt.lengths, prompt.tokens.shape[1]
    given = zip(options.rows(len(lengths)), prompt.tokens, lengths, options.limits(lengths), strict=True)
    copies = range(1 if options.num_beams > 1 else options.num_return_sequences)
    return [Row.of(each, own[width - length :], limit, copy) for each, own, length, limit in given for copy in copies]
