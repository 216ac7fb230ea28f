"""The cache of one attention layer and of a whole model, and the facts of one call that layers share."""

from .allocation import LayerPlan, LayerPlans, cache_bytes
from .chunk import Chunk
from .contents import EMPTY
from .context import Context, whole_chunk
from .guard import Guard
from .layer import LayerCache, Pending
from .model import KVCache
from .owner import CacheOwner, ReadsSource, owners
from .plan import plan_step, sliding_window
from .rows import Rows
from .source import Source, versions
from .static import Static
from .step import Step
from .transaction import transaction

__all__ = [
    "EMPTY",
    "CacheOwner",
    "Chunk",
    "Context",
    "Guard",
    "KVCache",
    "LayerCache",
    "LayerPlan",
    "LayerPlans",
    "Pending",
    "ReadsSource",
    "Rows",
    "Source",
    "Static",
    "Step",
    "cache_bytes",
    "owners",
    "plan_step",
    "sliding_window",
    "transaction",
    "versions",
    "whole_chunk",
]
