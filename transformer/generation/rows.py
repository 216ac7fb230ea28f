"""Rows of one generation: each with options of its own, its prompt, and its random generator."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    number: int = 0
    """Its number in the generation; beams of one row have one number."""

    @classmethod
    def of(
        cls,
        options: RowOptions,
        prompt_length: int,
        limit: int,
        device: torch.device,
        *,
        copy: int = 0,
        prompt: Sequence[int] = (),
        number: int = 0,
    ) -> "Row":
        """A row with its random generator on the device. `copy`: which of several samples it is, from 0 on."""
        generator = options.generator
        if options.seed is not None and options.temperature:
            generator = torch.Generator(device).manual_seed(options.seed + copy)
        return cls(options, prompt_length, limit, generator, tuple(prompt) if options.reads_prompt else (), number)

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
    lengths, device = prompt.lengths, prompt.tokens.device
    each, limits = options.rows(len(lengths)), options.limits(lengths)
    texts: list[list[int]] = [[]] * len(lengths)
    if any(row.reads_prompt for row in each):
        texts = [ids[len(ids) - length :] for ids, length in zip(prompt.tokens.tolist(), lengths, strict=True)]
    given = enumerate(zip(each, lengths, limits, texts, strict=True))
    copies = 1 if options.num_beams > 1 else options.num_return_sequences
    return [
        Row.of(row, length, limit, device, copy=copy, prompt=text, number=place * copies + copy)
        for place, (row, length, limit, text) in given
        for copy in range(copies)
    ]
