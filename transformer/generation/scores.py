"""Scores of given tokens: their log probabilities, and the perplexity of a long document."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import KnownInputs, run_uncached
from ..errors import ArgumentError, DtypeError, ShapeError, shown
from ..extras import missing
from .model_adapter import is_sharded
from .shared_by_ranks import check_logits_are_whole

TOKENS_AT_A_TIME = 1024
"""Tokens whose logits are normalised at a time, so that logits of 16 bits have no copy in float32."""


def token_log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Log probabilities [B, L] of ids int64 [B, L], each by the logits [B, L, V] of its column: float32 or float64."""
    parts = []
    for part, own in zip(torch.split(logits, TOKENS_AT_A_TIME, 1), torch.split(ids, TOKENS_AT_A_TIME, 1), strict=True):
        wide = part if part.dtype == torch.float64 else part.float()
        parts.append(wide.gather(-1, own.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1))
    return torch.cat(parts, 1)


def next_log_probabilities(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Log probabilities [B, L - 1] of each of `ids` int64 [B, L] after the first, by the logits of the token before it.

    `mask` [B, L]: real tokens. 0 at padding, and at the first real token of a row.
    """
    if mask is None:
        return token_log_probabilities(logits[:, :-1], ids[:, 1:])
    mask, columns = mask.bool(), torch.arange(ids.shape[1], device=ids.device)
    # The real token before each column; -1 where there is none.
    before = torch.where(mask, columns, -1).cummax(-1).values[:, :-1]
    scored = mask[:, 1:] & (before >= 0)
    own = logits.take_along_dim(before.clamp(min=0).unsqueeze(-1), 1)
    # A model may give anything at padding.
    return token_log_probabilities(own, ids[:, 1:].where(scored, 0)).where(scored, 0.0)


def perplexity(model: nn.Module, ids: Tensor, *, window: int, stride: int, progress: bool = False) -> float:
    """Perplexity of a document: the exponential of the mean negative log probability of its tokens.

    The document is read in windows that begin `stride` tokens apart. Each token is scored once, in the first window
    that has it, so after at least `window - stride` tokens; the very first token of a window is not scored. With
    `window` from the length of the document on it is the perplexity of one forward.

    Args:
        model: a module whose forward takes ids [B, L] and gives logits [B, L, V], in `eval()` mode; its caches are
            neither read nor changed.
        ids: int64 [L] or [1, L], with at least two tokens.
        window: tokens that are read at a time, at least 2.
        stride: tokens from the beginning of a window to that of the next, from 1 to `window`.
        progress: whether to show a bar (needs tqdm).

    Raises ArgumentError, ShapeError or DtypeError for invalid arguments.
    """
    _check(model, ids, window, stride, progress)
    document = ids.reshape(-1).long()
    length = document.shape[0]
    begins = range(0, max(length - window, 0) + stride, stride)
    total, count, scored = 0.0, 0, 0
    with torch.no_grad() if is_sharded(model) else torch.inference_mode():
        for begin in _shown(begins, progress):
            part = document[begin : begin + window].unsqueeze(0)
            logits: Tensor = run_uncached(KnownInputs(), model, part)
            new = max(scored, begin + 1)
            own = next_log_probabilities(logits, part, None)[:, new - begin - 1 :]
            total += float(own.double().sum())
            count += own.shape[1]
            scored = begin + part.shape[1]
    return math.exp(-total / count)


def _check(model: nn.Module, ids: Tensor, window: int, stride: int, progress: bool) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_logits_are_whole(model)
    if model.training:
        raise ArgumentError("model: expected eval() mode for a perplexity, got train(); call model.eval() first")
    if not isinstance(ids, Tensor):
        raise ArgumentError(f"ids: expected a tensor int64 [L], got {type(ids).__name__}; give torch.as_tensor(ids)")
    if ids.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"ids: expected int64 token ids, got {ids.dtype}")
    if ids.numel() < 2 or ids.shape not in ((ids.numel(),), (1, ids.numel())):
        raise ShapeError(f"ids: expected [L] or [1, L] with at least two tokens, got {list(ids.shape)}")
    if type(window) is not int or window < 2:
        raise ArgumentError(f"window: expected a whole number (int) of at least 2, got {shown(window)}")
    if type(stride) is not int or not 1 <= stride <= window:
        raise ArgumentError(f"stride: expected a whole number (int) from 1 to window={window}, got {shown(stride)}")
    if not isinstance(progress, bool):
        raise ArgumentError(f"progress: expected True or False, got {shown(progress)}")


def _shown(begins: range, progress: bool) -> Any:
    if not progress:
        return begins
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing("examples", "the bar of perplexity (progress=False leaves it out)", error) from error
    return tqdm(begins, desc="perplexity", leave=False)
