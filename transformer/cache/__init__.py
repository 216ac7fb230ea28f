"""The cache of one attention layer, and the facts of one call that layers share."""

from .context import Context, whole_chunk
from .guard import Guard
from .layer import EMPTY, LayerCache, Pending
from .plan import Chunk, plan_step
from .source import Source, versions
from .step import Step
from .transaction import transaction

__all__ = [
    "EMPTY",
    "Chunk",
    "Context",
    "Guard",
    "LayerCache",
    "Pending",
    "Source",
    "Step",
    "plan_step",
    "transaction",
    "versions",
    "whole_chunk",
]
