"""Tokens of a call with a `TokenLayout`: the checks of its tensors, the step, and what layers refuse."""

from dataclasses import replace

import torch
from torch import Tensor

from ..cache import EMPTY, CacheContents, FlatRun, Lengths, Step, TokenLayout
from ..errors import ArgumentError, CacheStateError, DeviceError, DtypeError, ShapeError
from ..masks import NO_TOKEN, Rule
from ..positions import ScoreBias
from ..tracing import is_traced
from . import checks
from .heads import CachedHeads

POSITIONS = "positions (position_ids of a model)"


def tokens_of(x: Tensor, attention_mask: Tensor | None, layout: TokenLayout | None) -> Step:
    """The tokens of `x` [B, L, E] in a call that shares no sequence, as the first of their rows.

    Raises ArgumentError, ShapeError, DtypeError or DeviceError for a mask or a layout that does not fit. In eager calls
    the host looks once at the mask, at segments and at prefixes; of traced calls it looks at nothing.
    """
    traced = is_traced(x)
    if layout is None:
        return checks.traced_tokens(x, attention_mask) if traced else checks.counted_tokens(x, attention_mask)
    layout = checked_layout(layout, attention_mask, (x.shape[0], x.shape[1]), x.device)
    if layout.segment_ids is not None:
        real: Tensor | None = layout.segment_ids != 0
    else:
        real = checks.real_tokens("attention_mask", attention_mask, x.shape[0], x.shape[1], x.device)
    if layout.position_ids is not None:
        layout = layout._replace(position_ids=_checked_positions(layout.position_ids, real))
    if traced:
        return Step.traced_of(x, real, layout)
    tokens = checks.counted_tokens(x, attention_mask)
    if layout.segment_ids is not None and real is not None:
        tokens = _packed(tokens, real, layout.segment_ids)
    elif layout.prefix_lengths is not None:
        tokens = _with_prefix(tokens, layout.prefix_lengths)
    return replace(tokens, layout=layout)


def checked_layout(
    layout: TokenLayout, attention_mask: Tensor | None, shape: tuple[int, int], device: torch.device
) -> TokenLayout:
    """The layout of tokens [B, L] with its numbers as int64. Raises as `tokens_of`, without a look at numbers."""
    if not isinstance(layout, TokenLayout):
        raise ArgumentError(f"layout: expected None or a TokenLayout, got {type(layout).__name__}")
    if layout.segment_ids is not None and attention_mask is not None:
        raise ArgumentError("attention_mask: expected None beside segment_ids, whose 0 is padding, got both")
    if layout.segment_ids is not None and layout.prefix_lengths is not None:
        raise ArgumentError(
            "prefix_lengths: expected None beside segment_ids, since a row of several documents has no prefix, got both"
        )
    shapes = {"segment_ids": shape, "prefix_lengths": shape[:1], POSITIONS: shape}
    return TokenLayout(
        *(
            None if tensor is None else _integers(name, tensor, shape, device)
            for (name, shape), tensor in zip(shapes.items(), layout, strict=True)
        )
    )


def check_serves(heads: CachedHeads, tokens: Step, rule: Rule, contents: CacheContents | None, cached: bool) -> None:
    """Raises ArgumentError or CacheStateError where a module cannot serve the layout of a call's tokens."""
    layout = tokens.layout
    if layout is None:
        return
    has_sinks = rule.num_sinks > 0 and rule.window is not None
    if tokens.traced and has_sinks:
        raise ArgumentError(
            "segment_ids, prefix_lengths: expected an eager call where a window has sinks, got one that is compiled, "
            "exported or transformed"
        )
    if layout.segment_ids is not None and cached:
        raise ArgumentError(
            "segment_ids: expected None with caches on, which have no place for several documents of one row; turn "
            "them off (disable_cache(), use_kv_cache=False), or give each document a row"
        )
    if layout.prefix_lengths is not None:
        if not rule.causal:
            raise ArgumentError("prefix_lengths: expected causal attention, got a module that sees both directions")
        if cached and heads.budget is not None:
            raise ArgumentError("prefix_lengths: expected caches without cache_budget, got one; set it to None")
        if contents is not None and contents.state is not None and tokens.prefix and max(contents.row_lengths):
            raise CacheStateError(
                "prefix_lengths: expected rows that begin with this call, since those before were read in causal "
                f"order, got caches of {max(contents.row_lengths)} tokens; clear them, or give None to go on"
            )
    if layout.position_ids is not None:
        if has_sinks:
            raise ArgumentError(f"{POSITIONS}: expected no window with sinks, whose distances are counted; give None")
        if cached and isinstance(heads.position, ScoreBias):
            raise ArgumentError(
                f"{POSITIONS}: expected caches to be off under {type(heads.position).__name__}, or a rotary scheme: a "
                "cache has rotated keys, but no positions; give None, or turn caches off"
            )


def refuse_layout(layout: TokenLayout | None, why: str) -> None:
    """Raises ArgumentError, naming what is there, for a call that takes no layout."""
    if layout is not None:
        names = "segment_ids", "prefix_lengths", POSITIONS
        given = [name for name, tensor in zip(names, layout, strict=True) if tensor is not None]
        raise ArgumentError(f"{', '.join(given) or 'layout'}: expected None {why}, got a tensor")


def _integers(name: str, tensor: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    letters = "[B]" if len(shape) == 1 else "[B, L]"
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"{name}: expected a tensor int {letters}, got {type(tensor).__name__}")
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise DtypeError(f"{name}: expected whole numbers {letters}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{name}: expected {letters} = {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise DeviceError(f"{name}: expected a tensor on {device}, as x, got {tensor.device}")
    return tensor.long()


def _packed(tokens: Step, real: Tensor, segment_ids: Tensor) -> Step:
    """The tokens of rows that contain documents."""
    on_host = segment_ids.cpu()
    real_on_host = on_host != 0
    begins = TokenLayout.begins(on_host)[real_on_host]
    lengths = Lengths(torch.bincount(begins.cumsum(0) - 1).tolist())
    run = FlatRun(real_on_host, lengths, tokens.device)
    return replace(tokens, new_lengths=Lengths.of(lengths) or EMPTY, real=real, run=run)


def _with_prefix(tokens: Step, prefix_lengths: Tensor) -> Step:
    prefix, batch = Lengths.of(prefix_lengths.tolist()), tokens.batch
    if not prefix or max(prefix) == min(prefix) == 0:
        return tokens
    lengths = tokens.new_lengths.expand(batch)
    for row, (number, length) in enumerate(zip(prefix.expand(batch), lengths, strict=True)):
        if not 0 <= number <= length:
            raise ArgumentError(
                f"prefix_lengths: expected from 0 to {length}, the real tokens of row {row} in this call, since one "
                f"call reads a prefix, got {number}"
            )
    run = tokens.run
    if run is None:
        run = FlatRun(torch.ones(batch, tokens.tokens, dtype=torch.bool, device="cpu"), lengths, tokens.device)
    return replace(tokens, run=run, prefix=prefix)


def _checked_positions(position_ids: Tensor, real: Tensor | None) -> Tensor:
    """The positions with `NO_TOKEN` at padding. Raises ArgumentError for one below 0, by an assert on other devices."""
    if real is not None:
        position_ids = position_ids.masked_fill(~real, NO_TOKEN)
    if is_traced(position_ids) or not position_ids.numel():
        return position_ids
    wrong = position_ids < 0 if real is None else (position_ids < 0) & real
    if not position_ids.is_cpu:
        torch._assert_async(~wrong.any(), f"{POSITIONS}: expected numbers from 0 on")
    elif bool(wrong.any()):
        raise ArgumentError(f"{POSITIONS}: expected numbers from 0 on, got {int(position_ids[wrong].min())}")
    return position_ids
