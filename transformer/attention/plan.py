"""The steps of all layers of a model, worked out before the first of them runs."""

from collections.abc import Hashable, Sequence

from torch import Tensor

from ..cache import EMPTY, Step
from ..errors import ArgumentError, CacheStateError
from . import checks
from .base import Attention


def plan_steps(
    layers: Sequence[Attention],
    x: Tensor,
    expanding_context: bool | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Step, ...]:
    """One step per layer, for a model's next call with `x` [B, L, E]; layers of one kind share theirs.

    A kind is whom a query sees (causal order, window, sinks), and whether there is a cache. The mask is
    looked at once for all kinds, and everything is checked before the first layer changes anything. `expanding_context`
    and `attention_mask` are those of the attention's forward, which then gets `step=` instead.

    Raises ShapeError, DtypeError or DeviceError as the call itself would, CacheStateError where the layers have not
    all seen the same tokens, and ArgumentError where a module with a cache stands in two layers.
    """
    if not layers:
        raise ArgumentError("layers: expected at least one attention module, got none")
    _check_each_once(layers)
    seen = _seen(layers[0])
    checks.check_tensor("x", x, layers[0].embed_dim, checks.weight_of(layers[0].q_proj))
    chunk = checks.chunk_of(x, attention_mask)
    steps: dict[Hashable, Step] = {}
    planned = []
    for index, layer in enumerate(layers):
        if _seen(layer) != seen:
            raise CacheStateError(
                f"layers: expected all to have seen the same tokens, got row lengths {seen} in layer 0 and "
                f"{_seen(layer)} in layer {index}; clear their caches, or set use_kv_cache alike"
            )
        kind = (layer.rule(chunk.gained, expanding_context), layer.use_kv_cache)
        step = steps.get(kind)
        if step is None:
            checks.check_tensor("x", x, layer.embed_dim, checks.weight_of(layer.q_proj))
            step = steps[kind] = layer.plan_chunk(chunk, expanding_context)
        elif layer.use_kv_cache and layer.kv_cache is not None:
            layer.kv_cache.check_batch(step.batch)
        planned.append(step)
    return tuple(planned)


def _seen(layer: Attention) -> tuple[int, ...]:
    """How many tokens each row of a layer has seen: one entry where all rows are alike."""
    cache = layer.kv_cache if layer.use_kv_cache else None
    # What a compiled step goes by is in tensors: it cannot compare them.
    return EMPTY if cache is None or cache.static is not None else cache.row_lengths


def _check_each_once(layers: Sequence[Attention]) -> None:
    if len(set(map(id, layers))) == len(layers):
        return
    for index, layer in enumerate(layers):
        if layer.use_kv_cache and any(layer is other for other in layers[:index]):
            raise ArgumentError(
                f"layers: expected each module with a kv_cache once, got one again as layer {index}; "
                "it would append the same tokens twice"
            )
