"""Grid of a run: its points, devices, dtypes and time."""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """A device and a dtype."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def random(self, *shape: int) -> Tensor:
        """Normally distributed numbers."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def filled(self, *shape: int) -> Tensor:
        """A large tensor in little time: a few random numbers, repeated."""
        count = torch.Size(shape).numel()
        few = self.random(min(count, 65521))  # a prime, so that no two rows are equal
        return few.repeat(-(-count // len(few)))[:count].view(shape)

    def ids(self, vocab_size: int, length: int) -> Tensor:
        """Token ids [1, length]."""
        return torch.randint(vocab_size, (1, length), device=self.device)

    def module(self, module: Module) -> Module:
        """The module on this device and in this dtype, in `eval()`."""
        return module.to(device=self.device, dtype=self.dtype).eval()


@dataclass(frozen=True)
class Model:
    """A decoder-only model of Llama's shape."""

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    num_groups: int
    d_ff: int
    vocab_size: int


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
class Grid:
    """All points of a run. Attention layers have `embed_dim` and `num_heads` unless a case has its own."""

    name: str = "full"
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of the decode steps; everything else is measured in the first."""
    seconds: float = 660.0
    """For all cases together; a little more is used, since each needs its rounds."""
    memory: float = 16e9
    """Bytes that a case may need, everybody in it together."""
    embed_dim: int = 1024
    num_heads: int = 16
    groups: tuple[int, ...] = (16, 4, 1)
    batches: tuple[int, ...] = (1, 8)
    cached: tuple[int, ...] = (128, 2048, 16384, 65536)
    chunks: tuple[int, ...] = (16, 256)
    chunks_on: tuple[int, ...] = (2048, 16384)
    prefill: tuple[int, ...] = (512, 4096, 16384)
    prefill_groups: tuple[int, ...] = (16, 4)
    windowed: tuple[tuple[int, int], ...] = ((256, 4096), (256, 8192), (1024, 4096), (1024, 16384))
    """Window and tokens."""
    streaming: tuple[tuple[int, int, int], ...] = ((1024, 4, 1_000_000), (512, 0, 100_000))
    """Window, sinks and tokens."""
    training: tuple[tuple[int, int], ...] = ((4, 512), (1, 2048))
    """Rows and tokens."""
    ragged: int = 1024
    """Tokens of the longest of the rows."""
    contexts: tuple[int, ...] = (50, 200, 1000)
    new_tokens: tuple[int, ...] = (10, 50, 100)
    generated: int = 32
    held: int = 1024
    """Tokens that the whole model has read before its step."""
    llama: Model = Model("Llama, 135M", 30, 576, 9, 3, 1536, 49152)
    small: Model = Model("6 layers, E 512", 6, 512, 8, 8, 2048, 1000)
    umt5: SourceModel = SourceModel("UMT5-small", 8, 512, 6, 64, 1024, 256384)
    stack_layers: int = 12
    compiler: str | None = "inductor"
    """What compiles a whole model's step, in a minute and a half; None leaves that point out."""

    def place(self, dtype: str | None = None) -> Place:
        """The columns of a case with its device and dtype; by default the first dtype."""
        return Place(self.device, DTYPES[dtype or self.dtypes[0]])

    @property
    def head_dim(self) -> int:
        """`D`."""
        return self.embed_dim // self.num_heads


FULL = Grid()

QUICK = replace(
    FULL,
    name="quick",
    seconds=70.0,
    cached=(128, 2048),
    batches=(1,),
    chunks_on=(2048,),
    prefill=(512,),
    windowed=((256, 4096),),
    streaming=((256, 4, 20_000),),
    training=((4, 256),),
    ragged=512,
    contexts=(50,),
    new_tokens=(10,),
    generated=8,
    held=128,
    stack_layers=6,
    compiler=None,
)
