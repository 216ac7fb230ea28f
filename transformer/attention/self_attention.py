"""Self-attention, with and without a cache: project, rotate, append, attend, project out."""

from functools import partial

import torch
from torch import Tensor

from ..cache import EMPTY, CacheContents, Step, Written, whole_chunk
from ..kernels import Kernel, given_bias
from ..positions import Rotation, ScoreBias
from .bias_layout import BiasLayout
from .blockwise import BlockwiseAttention
from .checks import check_attn_bias
from .heads import ProjectedHeads


def self_attention(
    heads: ProjectedHeads,
    kernel: Kernel,
    position: Rotation | ScoreBias | None,
    written: Written | None,
    x: Tensor,
    step: Step,
    attn_bias: Tensor | None,
    dropout: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None, CacheContents | None]:
    """Output [B, L, E], weights [B, H, L, S] where asked for, and what the cache holds then, where the call writes."""
    held = EMPTY if written is None else written.contents.row_cached_lengths
    shape = step.batch, heads.num_heads, step.tokens, max(held) + step.tokens
    if attn_bias is not None:
        check_attn_bias(attn_bias, shape, x.device)
    if step.width == 0 or step.batch == 0:
        # No real token: nothing happens, and the output of padding is 0, with a gradient of 0.
        out = x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)
        return out, x.new_zeros(shape) if return_weights else None, None
    packed = step.pack(x)
    query, key, value = heads.query(packed), heads.key(packed), heads.value(packed)
    # Kept for sinks alone: while gradients are recorded it would take as much memory as the queries.
    unrotated = query if step.rule.num_sinks else None
    rotation = position if isinstance(position, Rotation) else None
    if rotation is not None:
        table = step.once(("angles", rotation, key.dtype), partial(rotation.table, step.host_positions, key))
        query, key = rotation.rotate(query, table), rotation.rotate(key, table)
    if written is None:
        context, contents = whole_chunk(key, value, step), None
    else:
        context, contents = written.cache.append(written.contents, key, value, step)
    sink_query = query
    if unrotated is not None and rotation is not None and context.sink_key is not None and step.rule.window is not None:
        table = step.once(("near", rotation, key.dtype), partial(rotation.table, step.sink_query_positions, key))
        sink_query = rotation.rotate(unrotated, table)
    columns = BiasLayout(step, context, held) if attn_bias is not None or return_weights else None
    given = columns.to_kernel(given_bias(attn_bias, query)) if columns is not None and attn_bias is not None else None
    score_bias = position if isinstance(position, ScoreBias) else None
    attend = BlockwiseAttention(kernel, step, context, query, sink_query, score_bias, given, dropout)
    attended, weights = attend(return_weights)
    out = step.unpack(heads.out(attended))
    if weights is not None and columns is not None:
        weights = columns.from_kernel(weights)
    return out, weights, contents
