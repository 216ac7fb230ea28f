"""The cache of one attention layer and of a whole model, and the facts of one call that layers share."""

from ..deprecation import old_names
from .allocation import LayerPlan, LayerPlans, cache_bytes
from .budget import CacheBudget
from .cached_layer import CachedLayer
from .call import CacheCall, active_call, active_sequence, inside_a_call, run_call, run_uncached, sharing
from .contents import CacheContents
from .cross_kv import CrossKV
from .fingerprint import Projections
from .flat_run import FlatRun
from .holder import CacheHolder, CacheSlot, ReadsSource, holders, readers
from .key_value_view import KeyValueView, PlacedTokens, uncached_view
from .known_inputs import Generation, KnownInputs, KnownMask
from .layer import LayerCache
from .lease import Attribute, exchange
from .lengths import EMPTY, Lengths, on_device
from .model import KVCache
from .observed import Observation, Observed
from .policies import AccumulatedAttention, KeyNorm, LastQueries, Random, SinksAndNewest
from .policy import AnyPolicy, Needs, Policy
from .sequence_part import SequencePart, dealt
from .shared_prefix import SharedPrefix
from .shared_sequence import SequenceCall, SequenceLayout, SharedSequence, lengthened
from .spec import CacheSpec
from .state import SelfAttentionState
from .static_layout import StaticLayout, compiled_layout
from .step import Step
from .token_layout import TokenLayout

__all__ = [
    "EMPTY",
    "AccumulatedAttention",
    "AnyPolicy",
    "Attribute",
    "CacheBudget",
    "CacheCall",
    "CacheContents",
    "CacheHolder",
    "CacheSlot",
    "CacheSpec",
    "CachedLayer",
    "CrossKV",
    "FlatRun",
    "Generation",
    "KVCache",
    "KeyNorm",
    "KeyValueView",
    "KnownInputs",
    "KnownMask",
    "LastQueries",
    "LayerCache",
    "LayerPlan",
    "LayerPlans",
    "Lengths",
    "Needs",
    "Observation",
    "Observed",
    "PlacedTokens",
    "Policy",
    "Projections",
    "Random",
    "ReadsSource",
    "SelfAttentionState",
    "SequenceCall",
    "SequenceLayout",
    "SequencePart",
    "SharedPrefix",
    "SharedSequence",
    "SinksAndNewest",
    "StaticLayout",
    "Step",
    "TokenLayout",
    "active_call",
    "active_sequence",
    "cache_bytes",
    "compiled_layout",
    "dealt",
    "exchange",
    "holders",
    "inside_a_call",
    "lengthened",
    "on_device",
    "readers",
    "run_call",
    "run_uncached",
    "sharing",
    "uncached_view",
]

__getattr__ = old_names(
    __name__,
    {
        "Chunk": ("Step", Step),
        "Contents": ("CacheContents", CacheContents),
        "Context": ("KeyValueView", KeyValueView),
        "Rows": ("Lengths", Lengths),
        "Source": ("CrossKV", CrossKV),
        "Static": ("StaticLayout", StaticLayout),
        "Written": ("CachedLayer", CachedLayer),
        "whole_chunk": ("uncached_view", uncached_view),
    },
)
