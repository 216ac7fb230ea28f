"""Generation for any model with a forward: sampling, the decode loop, and beam search."""

from ..deprecation import old_names
from .batch import Batch
from .constraints import PrefixAllowedTokens, SequenceBias
from .filters import XTC, TypicalP
from .generate import generate, generate_whole, run_generate, stream
from .generated import Generated
from .history import History, HistoryProcessor
from .keywords import generation_options
from .model_adapter import CacheProvider, ForwardAdapter, ModelAdapter, is_sharded
from .option_types import GenerationKeywords, UseCache
from .options import GenerationOptions
from .penalties import DRY, FrequencyPenalty, NoRepeatNGram, PresencePenalty
from .prefix_cache import PrefixCache
from .processors import MinP, Processor, RepetitionPenalty, Temperature, TopK, TopP
from .row_options import Criterion, TextDecoder
from .scores import next_log_probabilities, perplexity
from .session import Session
from .stops import StopReason

__all__ = [
    "DRY",
    "XTC",
    "Batch",
    "CacheProvider",
    "Criterion",
    "ForwardAdapter",
    "FrequencyPenalty",
    "Generated",
    "GenerationKeywords",
    "GenerationOptions",
    "History",
    "HistoryProcessor",
    "MinP",
    "ModelAdapter",
    "NoRepeatNGram",
    "PrefixAllowedTokens",
    "PrefixCache",
    "PresencePenalty",
    "Processor",
    "RepetitionPenalty",
    "SequenceBias",
    "Session",
    "StopReason",
    "Temperature",
    "TextDecoder",
    "TopK",
    "TopP",
    "TypicalP",
    "UseCache",
    "generate",
    "generate_whole",
    "generation_options",
    "is_sharded",
    "next_log_probabilities",
    "perplexity",
    "run_generate",
    "stream",
]

__getattr__ = old_names(
    __name__,
    {
        "ForwardReader": ("ForwardAdapter", ForwardAdapter),
        "LendsCaches": ("CacheProvider", CacheProvider),
        "Reader": ("ModelAdapter", ModelAdapter),
    },
)
