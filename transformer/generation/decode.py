"""Decode loop: one token of each row per step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .decoding import Decoding, checked, checked_choice
from .options import GenerationOptions
from .processors import processed, tokens_so_far


def decode(
    rows: Decoding, prompt: Tensor, real: Tensor | None, options: GenerationOptions, *, keep: bool
) -> Iterator[Tensor]:
    """Yields the next token of each row, int64 [B * num_return_sequences], until all rows are finished.

    `prompt` int64 [B, L] has padding on the left where `real` is false. With `keep=True` the caches contain, when a
    token is yielded, all tokens up to this token and no others.
    """
    logits = rows.begin(prompt, real)
    copies = options.num_return_sequences
    if copies > 1:
        rows.select([row for row in range(prompt.shape[0]) for _ in range(copies)])
        logits, prompt = logits.repeat_interleave(copies, 0), prompt.repeat_interleave(copies, 0)
        real = None if real is None else real.repeat_interleave(copies, 0)
    (batch, length), device = prompt.shape, prompt.device
    lengths = [length] * batch if real is None else real.sum(-1).tolist()
    limits, chain = options.limits(lengths), options.chain()
    history = tokens_so_far(prompt, real)
    written: list[list[int]] = [[] for _ in range(batch)]
    live = [True] * batch
    for step in range(max(limits)):
        was_live = None if all(live) else torch.tensor(live, device=device)
        logits = checked(logits, was_live, step)
        if options.processors:
            # A processor may write in place, and the logits belong to the model.
            logits = logits.clone()
        logits = processed(chain, history[:, : length + step], logits)
        if options.processors:
            logits = checked_choice(logits, was_live, step)
        tokens = options.take(logits)
        if history.shape[1] == length + step:
            history = torch.cat((history, torch.zeros_like(history)), 1)
        # A finished row gets no new id, so that processors see only tokens of the row.
        history[:, length + step] = tokens if was_live is None else tokens.where(was_live, history[:, 0])
        for row, token in enumerate(tokens.tolist()):
            if live[row]:
                written[row].append(token)
                live[row] = len(written[row]) < limits[row] and not options.ends(written[row])
        if keep or any(live):
            logits = rows.advance(tokens, was_live)
        yield tokens if was_live is None else tokens.where(was_live, options.padding)
        if not any(live):
            return
