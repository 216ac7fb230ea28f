"""Shapes of the models that are measured, and the lengths of rows in padded batches."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Model:
    """A decoder-only model of Llama's shape, or of Qwen3's where queries and keys are normalised."""

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    num_groups: int
    d_ff: int
    vocab_size: int
    head_dim: int | None = None
    qk_norm: bool = False


@dataclass(frozen=True)
class SourceModel:
    """An encoder-decoder model of UMT5's shape."""

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int


@dataclass(frozen=True)
class EncoderModel:
    """An encoder of BERT's shape."""

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    vocab_size: int


class Rows(NamedTuple):
    """A padded batch: so many rows, whose lengths are spread evenly."""

    rows: int
    shortest: int
    longest: int

    def lengths(self) -> list[int]:
        """The real tokens of each row, in a mixed order."""
        step = (self.longest - self.shortest) / max(1, self.rows - 1)
        lengths = [round(self.shortest + step * index) for index in range(self.rows)]
        # Short and long rows beside each other, as they come.
        return lengths[::2] + lengths[1::2][::-1]

    def __str__(self) -> str:
        return f"{self.rows} of {self.shortest} to {self.longest}"


LLAMA_135M = Model("Llama, 135M", 30, 576, 9, 3, 1536, 49152)
ASSISTANT = Model("Llama, an eighth of 135M", 5, 256, 8, 2, 768, 49152)
QWEN3 = Model("Qwen3, 0.6B", 28, 1024, 16, 8, 3072, 151936, head_dim=128, qk_norm=True)
SIX_LAYERS = Model("6 layers, E 512", 6, 512, 8, 8, 2048, 1000)
EIGHT_LAYERS = Model("8 layers, E 256", 8, 256, 8, 2, 1024, 4096)
HOST_BOUND = Model("4 layers, E 64", 4, 64, 4, 2, 256, 512), Model("8 layers, E 128", 8, 128, 4, 2, 512, 512)
"""So small that the time of a step is that of Python and of starting operations."""

UMT5_SMALL = SourceModel("UMT5-small", 8, 512, 6, 64, 1024, 256384)
MINILM = EncoderModel("encoder, 6 layers, E 384", 6, 384, 12, 1536, 30522)
