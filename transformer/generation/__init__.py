"""Generation for anything with a forward and caches: sampling, the decode loop, beams."""

from .generate import generate, generate_whole, stream
from .keywords import generation_options
from .options import GenerationKeywords, GenerationOptions, UseCache
from .processors import MinP, Processor, RepetitionPenalty, Temperature, TopK, TopP
from .reader import ForwardReader, LendsCaches, Reader, is_sharded
from .session import Session

__all__ = [
    "ForwardReader",
    "GenerationKeywords",
    "GenerationOptions",
    "LendsCaches",
    "MinP",
    "Processor",
    "Reader",
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
