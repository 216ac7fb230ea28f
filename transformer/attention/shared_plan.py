"""Steps of calls over a sequence that ranks share, and what such calls refuse, before anything changes."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..cache import CacheCall, Lengths, SelfAttentionState, SequenceCall, SharedSequence, StaticLayout, Step
from ..errors import ArgumentError, CacheStateError, ShapeError
from ..tracing import is_traced
from . import checks
from .heads import CachedHeads


def shared_tokens(
    sequence: SharedSequence,
    layers: Sequence[CachedHeads],
    x: Tensor,
    call: CacheCall | None,
    expanding_context: bool | None,
    attention_mask: Tensor | None,
) -> Step:
    """The tokens of `x` [B, L, E], as the first of their rows, with what the call knows of its shared sequence.

    Without caches `x` is this rank's part; with caches it is whole, and the same on every rank. Raises ArgumentError,
    ShapeError or CacheStateError for a call that cannot be shared, and RanksError where ranks make different calls.
    """
    if is_traced(x):
        check_not_shared(sequence)
    if not all(map(sequence.covers, layers)):
        raise ArgumentError(
            "model: expected one with all layers of a stack in it, got some; give share_sequence the whole stack"
        )
    kept = [layer.keeps(call) for layer in layers]
    cached = kept[0]
    if any(each is not cached for each in kept):
        raise ArgumentError(
            "share_sequence: expected caches in all of its layers or in none, got some of both; set use_kv_cache alike"
        )
    for layer in layers:
        _check_options(layer, call, expanding_context, cached)
    real = checks.real_tokens("attention_mask", attention_mask, x.shape[0], x.shape[1], x.device)
    past = _cached_length(layers, call)
    numbers = {
        "bits of a number": 8 * x.itemsize,
        "rows": x.shape[0],
        "tokens": x.shape[1],
        "caches on (1) or off (0)": int(cached),
        "tokens in the cache": past,
        "a cache of other ranks (1) or none (0)": int(_is_of_other_ranks(sequence, layers, call)),
        "attention_mask given (1) or not (0)": int(real is not None),
    }
    if cached:
        if torch.is_grad_enabled():
            raise CacheStateError(
                "share_sequence: expected a call with caches to record no gradients; call it within torch.no_grad() or "
                "torch.inference_mode(), and train without caches"
            )
        tokens = checks.counted_tokens(x, attention_mask)
        if tokens.run is not None:
            raise ArgumentError(
                "attention_mask: expected rows without padding in a shared sequence with caches, got some; give rows "
                "of one length, or one after the other"
            )
        sequence.check_alike(numbers, x)
        return replace(tokens, sequence=SequenceCall(sequence, x.shape[1], is_part=False))
    if call is not None and call.is_generation:
        raise ArgumentError(
            "use_cache: expected a generation with caches in a shared sequence, got one without, score or "
            "perplexity; give generate use_cache=True, and score by a forward over parts_of(ids, mesh)"
        )
    sequence.check_alike(numbers, None)
    if x.shape[1] % 2:
        raise ShapeError(
            f"x: expected this rank's part, of two chunks of equal length, got {x.shape[1]} tokens; cut it by parts_of"
        )
    length, row_lengths = x.shape[1] * sequence.ranks, None
    whole = SequenceCall(sequence, length, is_part=True)
    if real is not None:
        row_lengths = _row_lengths(whole, real)
    return replace(Step.of(x, None), sequence=whole._replace(real=real, row_lengths=row_lengths))


def check_not_shared(sequence: SharedSequence | None) -> None:
    """Raises ArgumentError where a traced call would be over a shared sequence."""
    if sequence is not None:
        raise ArgumentError("share_sequence: expected an eager call, got one that is compiled, exported or transformed")


def _cached_length(layers: Sequence[CachedHeads], call: CacheCall | None) -> int:
    """Tokens that each row has seen. Raises CacheStateError where rows differ."""
    contents = (layer.contents(call) for layer in layers)
    lengths = [each.row_lengths for each in contents if each is not None]
    if not all(each.uniform for each in lengths):
        raise CacheStateError(
            "share_sequence: expected rows of one length in the caches, got different lengths; give rows of one "
            "length, or one after the other"
        )
    return max((each[0] for each in lengths), default=0)


def _is_of_other_ranks(sequence: SharedSequence, layers: Sequence[CachedHeads], call: CacheCall | None) -> bool:
    """True if some layer caches a part of tokens that other ranks share: told to all, so that none waits for one that
    refuses."""
    states = (contents.state for layer in layers if (contents := layer.contents(call)) is not None)
    parts = (state.part for state in states if isinstance(state, SelfAttentionState))
    return any(not part.is_of(sequence.rank, sequence.ranks) for part in parts if part is not None)


def _check_options(layer: CachedHeads, call: CacheCall | None, expanding_context: bool | None, cached: bool) -> None:
    """Raises ArgumentError or CacheStateError for what a part of a sequence cannot serve."""
    windowed = layer.window_size is not None if expanding_context is None else not expanding_context
    if windowed and layer.window_size is None:
        raise ArgumentError(
            "expanding_context: expected None or True for a module without a window_size in a shared sequence, got "
            "False; build it with a window_size"
        )
    if layer.rules is not None:
        raise ArgumentError(
            "share_sequence: expected layers without mask_rule and score_rule, got one with it, whose positions are "
            "those of all ranks; set both to None"
        )
    if layer.sink_logits is not None:
        raise ArgumentError("share_sequence: expected layers without sink_logits, got one with it; call outside of it")
    if not cached:
        return
    if layer.budget is not None or layer.cache_dtype is not None:
        raise ArgumentError(
            "share_sequence: expected caches without cache_budget and cache_dtype, got one with it; set both to None"
        )
    if layer.max_cache_length is not None and not windowed:
        raise ArgumentError(
            "share_sequence: expected caches without max_cache_length, since each rank holds a part that grows, got "
            f"{layer.max_cache_length}; set it to None"
        )
    if layer.training and layer.dropout:
        raise ArgumentError("share_sequence: expected no dropout in a call with caches; call eval() first")
    contents = layer.contents(call)
    state = None if contents is None else contents.state
    if isinstance(state, StaticLayout):
        raise CacheStateError("share_sequence: expected caches as they are, got one after freeze_layout(); clear it")
    if isinstance(state, SelfAttentionState) and state.part is not None and windowed:
        raise CacheStateError(
            "expanding_context: expected a layer whose ranks have parts of its tokens to go on without a window, got "
            "one that slides; clear the cache"
        )


def _row_lengths(whole: SequenceCall, real: Tensor) -> Lengths:
    """Real tokens of each row on all ranks together. Raises ArgumentError unless padding is on the right."""
    mask = whole.layout.gathered(whole.sequence, real.byte()).bool().cpu()
    lengths = mask.sum(-1)
    on_the_right = mask == (torch.arange(whole.length, device="cpu") < lengths.unsqueeze(-1))
    if not (bool(on_the_right.all()) and bool(lengths.all())):
        raise ArgumentError(
            "attention_mask: expected padding on the right of each row of a shared sequence, and a real token in each "
            "row, got other padding; move it to the right before parts_of"
        )
    return Lengths.of(lengths.tolist())
