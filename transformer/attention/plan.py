"""Steps of all layers of a model, computed before the first of them runs."""

from collections.abc import Hashable, Sequence

from torch import Tensor

from ..cache import (
    EMPTY,
    CacheCall,
    StaticLayout,
    Step,
    TokenLayout,
    active_call,
    active_sequence,
    compiled_layout,
)
from ..errors import ArgumentError, CacheStateError
from ..masks import EVERYTHING
from ..tracing import is_traced
from . import checks
from .base import Attention
from .layouts import check_serves, refuse_layout, tokens_of
from .self_attention import step_after
from .shared_plan import shared_tokens


def plan_steps(
    layers: Sequence[Attention],
    x: Tensor,
    expanding_context: bool | None = None,
    attention_mask: Tensor | None = None,
    layout: TokenLayout | None = None,
) -> tuple[Step, ...]:
    """One step per layer, for a model's next call with `x` [B, L, E]; layers of one kind share theirs.

    A kind is the rule of visibility (causal order, window, sinks), and whether there is a cache. The mask is read
    once for all kinds, and everything is checked before the first layer changes anything. `expanding_context`
    and `attention_mask` are those of the attention's forward, which then gets `step=` instead; a `layout` says more of
    the tokens: packed documents, prefixes, positions.

    Raises ShapeError, DtypeError or DeviceError as the call itself would, CacheStateError where the layers have not
    all read the same tokens, and ArgumentError where two layers share a module with a cache.
    """
    if not layers:
        raise ArgumentError("layers: expected at least one attention module, got none")
    call = active_call()
    checks.check_mode(expanding_context)
    checks.check_tensor("x", x, layers[0].embed_dim, None)
    sequence = active_sequence(layers)
    if sequence is None and is_traced(x) and not any(layer.keeps(call) for layer in layers):
        return _traced_steps(layers, tokens_of(x, attention_mask, layout), expanding_context)
    if sequence is None:
        tokens = checks.counted_tokens(x, attention_mask) if layout is None else tokens_of(x, attention_mask, layout)
    else:
        refuse_layout(layout, "in a shared sequence")
        tokens = shared_tokens(sequence, layers, x, call, expanding_context, attention_mask)
    if len(set(map(id, layers))) < len(layers):
        _check_each_once(layers, call)
    steps: dict[Hashable, Step] = {}
    planned = []
    first = None
    for index, layer in enumerate(layers):
        contents = layer.contents(call)
        state = None if contents is None else contents.state
        # A compiled step has its lengths in tensors, which cannot be compared.
        compiled = isinstance(state, StaticLayout) and compiled_layout(state) is not None
        lengths = EMPTY if state is None or compiled else state.length
        first = lengths if first is None else first
        if lengths != first:
            raise CacheStateError(
                f"layers: expected all to have read the same tokens, got row lengths {first} in layer 0 and "
                f"{lengths} in layer {index}; clear their caches, or set use_kv_cache alike"
            )
        kind = (layer.rule(contents, tokens.new_lengths, expanding_context), contents is None)
        if tokens.layout is not None:
            check_serves(layer, tokens, kind[0], contents, layer.keeps(call))
        step = steps.get(kind)
        if step is None:
            step = steps[kind] = step_after(tokens, contents, kind[0], expanding_context)
        elif contents is not None and state is not None and state.buffers.key.shape[0] != step.batch:
            contents.check_batch(step.batch)
        planned.append(step)
    return tuple(planned)


def plan_without_cache(x: Tensor, expanding_context: bool | None = None, attention_mask: Tensor | None = None) -> Step:
    """The step of tokens `x` [B, L, E] from position 0 on, in a stack without attention modules."""
    checks.check_mode(expanding_context)
    tokens = checks.traced_tokens(x, attention_mask) if is_traced(x) else checks.counted_tokens(x, attention_mask)
    return tokens.following(EMPTY, EVERYTHING, expanding_context)


def _traced_steps(layers: Sequence[Attention], tokens: Step, expanding_context: bool | None) -> tuple[Step, ...]:
    rules = [layer.traced_rule(expanding_context) for layer in layers]
    for layer, rule in zip(layers, rules, strict=True):
        check_serves(layer, tokens, rule, None, False)
    steps = {rule: tokens.following(EMPTY, rule, expanding_context) for rule in dict.fromkeys(rules)}
    return tuple(steps[rule] for rule in rules)


def _check_each_once(layers: Sequence[Attention], call: CacheCall | None) -> None:
    for index, layer in enumerate(layers):
        if layer.keeps(call) and any(layer is other for other in layers[:index]):
            raise ArgumentError(
                f"layers: expected each module with a kv_cache once, got one again as layer {index}; "
                "it would append the same tokens twice"
            )
