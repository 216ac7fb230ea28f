"""The cache of one attention layer and of a whole model, and the facts of one call that layers share."""

from .allocation import LayerPlan, LayerPlans, cache_bytes
from .call import CacheCall, Written, active_call, inside_a_call, run_call, run_eagerly
from .chunk import Chunk
from .contents import EMPTY, Contents
from .context import Context, whole_chunk
from .exchange import Attribute, exchange
from .fingerprint import Projections
from .holder import CacheHolder, ReadsSource, holders, readers
from .layer import LayerCache
from .model import KVCache
from .plan import frozen, plan_step, sliding_window, traced_step
from .rows import Rows
from .slot import CacheSlot
from .source import Source
from .static import Static
from .step import Step

__all__ = [
    "EMPTY",
    "Attribute",
    "CacheCall",
    "CacheHolder",
    "CacheSlot",
    "Chunk",
    "Contents",
    "Context",
    "KVCache",
    "LayerCache",
    "LayerPlan",
    "LayerPlans",
    "Projections",
    "ReadsSource",
    "Rows",
    "Source",
    "Static",
    "Step",
    "Written",
    "active_call",
    "cache_bytes",
    "exchange",
    "frozen",
    "holders",
    "inside_a_call",
    "plan_step",
    "readers",
    "run_call",
    "run_eagerly",
    "sliding_window",
    "traced_step",
    "whole_chunk",
]
