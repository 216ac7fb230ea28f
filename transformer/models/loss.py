"""Cross-entropy loss of a language head: from whole logits, or over chunks of tokens, whose memory is bounded."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import TokenLayout, real_tokens
from ..attention.layouts import checked_layout
from ..cache import FlatRun
from ..errors import ArgumentError, DeviceError, ShapeError
from ..plain import is_token_wise
from .inputs import named_mask
from .tokens import checked_ids, last_states, logits_of

IGNORED = -100
"""Label of a token that does not count, as in `cross_entropy` and in transformers."""

LOGITS_AT_ONCE = 1 << 24
"""Logits of one chunk: 64 MiB in float32."""


def checked_labels(labels: Tensor, vocab_size: int) -> Tensor:
    """The labels as int64 [B, L].

    Raises ArgumentError, ShapeError or DtypeError; ArgumentError also for a label that is neither `IGNORED` nor in the
    vocabulary.
    """
    given: object = labels
    ids = labels.masked_fill(labels == IGNORED, 0) if isinstance(given, Tensor) else labels
    checked_ids("labels", ids, vocab_size, "labels", None)
    return labels.long()


def real_labels(labels: Tensor, tokens: Tensor, mask_name: str, mask: Tensor | None) -> Tensor:
    """Labels of `tokens` [B, L, ...], with `IGNORED` at the padding of a mask [B, L].

    Raises ShapeError or DeviceError for labels unlike the tokens.
    """
    if labels.shape != tokens.shape[:2]:
        raise ShapeError(
            f"labels: expected {list(tokens.shape[:2])}, one for each token, got {list(labels.shape)}; -100 where "
            "none counts"
        )
    if labels.device != tokens.device:
        raise DeviceError(f"labels: expected a tensor on {tokens.device}, as the tokens, got one on {labels.device}")
    real = real_tokens(mask_name, mask, labels.shape[0], labels.shape[1], labels.device)
    return labels if real is None else labels.masked_fill(~real, IGNORED)


def next_labels(labels: Tensor, tokens: Tensor, mask: Tensor | None, layout: TokenLayout | None = None) -> Tensor:
    """The label of the token after each one of `tokens` [B, L, ...]; `IGNORED` after the last one of a row or document,
    beside padding, and for tokens of a prefix, which those before them see.

    Raises as `real_labels`, and as a call with such a layout.
    """
    if layout is not None:
        layout = checked_layout(layout, mask, (tokens.shape[0], tokens.shape[1]), tokens.device)
    name, mask = named_mask(layout, mask)
    labels = real_labels(labels, tokens, name, mask)
    if layout is not None and layout.segment_ids is not None:
        labels = labels.masked_fill(layout.begins(layout.segment_ids), IGNORED)
    elif layout is not None and layout.prefix_lengths is not None:
        real = torch.ones_like(labels) if mask is None else (mask != 0).long()
        labels = labels.masked_fill(real.cumsum(-1) <= layout.prefix_lengths.unsqueeze(-1), IGNORED)
    following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return real_labels(following, tokens, name, mask)


def shifted_right(labels: Tensor, start_token: int, pad_token: int | None) -> Tensor:
    """The ids by which a decoder predicts these labels [B, L]: the start token, then all labels except for the last.

    Ignored labels become `pad_token` (None: 0).
    """
    ids = labels.masked_fill(labels == IGNORED, pad_token or 0)
    return F.pad(ids, (1, 0), value=start_token)[:, :-1]


def loss_and_logits(
    head: nn.Module, states: Tensor, labels: Tensor, logits_to_keep: int, run: FlatRun | None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the labels [B, L] that count, and logits, from the head's input [B, L, E].

    `labels` are those that each state predicts. With `logits_to_keep` the head reads chunks of tokens, where it works
    token by token, and logits [B, L, V] are never formed. NaN where no label counts, as by `cross_entropy`.
    """
    if logits_to_keep == 0 or not is_token_wise(head):
        logits = logits_of(head, states, 0, run)
        total = _summed(logits.flatten(0, 1), labels.flatten())
        logits = last_states(logits, logits_to_keep)
    else:
        logits = logits_of(head, states, logits_to_keep, run)
        total = _summed_in_chunks(head, states, labels, logits.shape[-1], run)
    return total / (labels != IGNORED).sum(), logits


def _summed_in_chunks(head: nn.Module, states: Tensor, labels: Tensor, vocab_size: int, run: FlatRun | None) -> Tensor:
    if run is None or run.width == 0:
        states, labels = states.flatten(0, 1), labels.flatten()
    else:
        states, labels = run.take(states)[0], run.take(labels)[0]
    size = max(1, LOGITS_AT_ONCE // vocab_size)
    if states.shape[0] <= size:
        return _summed_by(head, states, labels)
    total = states.new_zeros((), dtype=_sum_dtype(states))
    for part, own in zip(torch.split(states, size), torch.split(labels, size), strict=True):
        if torch.is_grad_enabled():
            # Backward computes the logits again, instead of keeping those of all chunks.
            total = total + checkpoint(_summed_by, head, part, own, use_reentrant=False)
        else:
            total = total + _summed_by(head, part, own)
    return total


def _summed_by(head: nn.Module, states: Tensor, labels: Tensor) -> Tensor:
    """Sum over the tokens [N] of their cross-entropy, from the head's input [N, E]."""
    logits: Any = head(states.unsqueeze(0))
    return _summed(logits[0], labels)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    try:
        return F.cross_entropy(logits.to(_sum_dtype(logits)), labels, ignore_index=IGNORED, reduction="sum")
    except RuntimeError as error:
        # Logits of a parallel model that stay cut over the vocabulary.
        if type(logits).__name__ != "DTensor":
            raise
        raise ArgumentError(
            "labels: expected a model that gives logits of the whole vocabulary, or a call within "
            "torch.distributed.tensor.parallel.loss_parallel(), got one of parallelize(..., gather_logits=False) "
            f"outside of it: {error!s:.200}"
        ) from error


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
