"""Grid of a run: its points, devices, dtypes and time."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import shapes
from .shapes import EncoderModel, Model, Rows, SourceModel

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

    def ids(self, vocab_size: int, length: int, rows: int = 1) -> Tensor:
        """Token ids [rows, length], none of them one of the first four, which are special in some vocabularies."""
        return torch.randint(4, vocab_size, (rows, length), device=self.device)

    def mask(self, rows: Rows, *, left: bool) -> Tensor:
        """True for the real tokens of a padded batch, [B, longest]; padding is on the left or on the right."""
        column = torch.arange(rows.longest, device=self.device)
        real = column < torch.tensor(rows.lengths(), device=self.device)[:, None]
        return real.flip(1) if left else real

    def module(self, module: Module) -> Module:
        """The module on this device and in this dtype, in `eval()`."""
        return module.to(device=self.device, dtype=self.dtype).eval()


@dataclass(frozen=True)
class Grid:
    """All points of a run. Attention layers have `embed_dim` and `num_heads` unless a case has its own."""

    name: str = "full"
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of decode steps and whole models; everything else is measured in the first."""
    second: float = 3.5
    """Time of a case of weight 1, in seconds; a little more is used, since each needs its rounds."""
    memory: float = 17.5e9
    """Bytes that a case may need, everybody in it together."""
    embed_dim: int = 1024
    num_heads: int = 16
    groups: tuple[int, ...] = (16, 4, 1)
    batches: tuple[int, ...] = (1, 8)
    cached: tuple[int, ...] = (128, 2048, 4096, 16384, 65536)
    shared: tuple[tuple[int, int], ...] = ((2, 1024), (16, 256), (16, 8192))
    """Rows and the tokens of their common prompt."""
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
    llama: Model = shapes.LLAMA_135M
    small: Model = shapes.SIX_LAYERS
    umt5: SourceModel = shapes.UMT5_SMALL
    qwen3: Model = shapes.QWEN3
    encoder: EncoderModel = shapes.MINILM
    assistant: Model = shapes.ASSISTANT
    """An eighth of the weights of `llama`, for which it guesses."""
    pair_steps: int = 300
    """Training steps of each model of a pair of which one guesses: some minutes on two cores."""
    long_prompt: tuple[int, int] = (12_000, 1_024)
    """Tokens of a long prompt, and a window over it."""
    decoder: Model = shapes.EIGHT_LAYERS
    host_bound: tuple[Model, ...] = shapes.HOST_BOUND
    stack_layers: int = 12
    rows: tuple[int, ...] = (1, 8)
    """Of the models that are released in bfloat16."""
    few: int = 16
    """New tokens of the larger models."""
    padded: tuple[Rows, ...] = (Rows(32, 8, 128), Rows(16, 8, 64))
    forward: tuple[tuple[int, int], ...] = ((1, 16), (1, 64), (8, 64), (8, 256), (1, 1024))
    """Rows and tokens of a whole model's forward."""
    batch: int = 16
    """Rows of a generation in a batch."""
    trained: tuple[int, int] = (4, 256)
    """Rows and tokens of a whole model's training step."""
    compiler: str | None = "inductor"
    """What compiles a whole model's step, in a minute and a half; None leaves that point out."""
    before: Path | None = None
    """Folder of an earlier version of the library, which a process of its own loads."""

    def place(self, dtype: str | None = None) -> Place:
        """The columns of a case with its device and dtype; by default the first dtype."""
        return Place(self.device, DTYPES[dtype or self.dtypes[0]])

    @property
    def on_cpu(self) -> bool:
        """True where libraries for the CPU alone can take part."""
        return self.device == "cpu"

    @property
    def head_dim(self) -> int:
        """`D`."""
        return self.embed_dim // self.num_heads


FULL = Grid()

QUICK = replace(
    FULL,
    name="quick",
    second=1.0,
    cached=(128, 2048),
    batches=(1,),
    shared=((16, 256), (16, 2048)),
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
    rows=(1,),
    few=4,
    pair_steps=30,
    padded=(Rows(8, 8, 64),),
    forward=((1, 16), (8, 64)),
    batch=8,
    trained=(2, 64),
    compiler=None,
)
