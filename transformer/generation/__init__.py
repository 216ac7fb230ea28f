"""Generation for anything with a forward and caches: sampling, the decode loop, beams."""

from ..deprecation import old_names
from .generate import generate, generate_whole, stream
from .keywords import generation_options
from .model_adapter import ForwardAdapter, LendsCaches, ModelAdapter, is_sharded
from .options import GenerationKeywords, GenerationOptions, UseCache
from .processors import MinP, Processor, RepetitionPenalty, Temperature, TopK, TopP
from .session import Session

__all__ = [
    "ForwardAdapter",
    "GenerationKeywords",
    "GenerationOptions",
    "LendsCaches",
    "MinP",
    "ModelAdapter",
    "Processor",
    "RepetitionPenalty",
    "Session",
    "Temperature",
    "TopK",
    "TopP",
    "UseCache",
    "generate",
    "generate_whole",
    "generation_options",
    "is_sharded",
    "stream",
]

__getattr__ = old_names(
    __name__, {"ForwardReader": ("ForwardAdapter", ForwardAdapter), "Reader": ("ModelAdapter", ModelAdapter)}
)
