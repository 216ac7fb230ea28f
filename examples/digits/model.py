"""Reader of digit strips: a small convolution over the columns, an encoder, and a decoder that generates the digits.

Training on short strips is sufficient for long ones, because no part of the model depends on the length:

- the convolution and the window of the encoder read only the surroundings of a column;
- the t-th token of the decoder belongs to the t-th cell of the strip: both carry the same position vector, and
  cross-attention is initialized to compare positions, so that it attends to its cell before any training;
- in training the position of the first cell is drawn at random for each batch, so that all positions are trained.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strips import START, STOP
from transformer.blocks import RMSNorm
from transformer.models import EncoderDecoderTransformer
from transformer.positions import AbsolutePositions, TokenPositions

TIED = "transformer.head.proj.weight"


@dataclass(frozen=True)
class Size:
    """Sizes of a reader: pixels of a cell, `E`, `H`, the width of its feed-forward networks, its layers."""

    cell: int
    width: int = 128
    heads: int = 4
    hidden: int = 256
    encoder_layers: int = 1
    decoder_layers: int = 2


class Places(AbsolutePositions):
    """Position embedding by the place on the strip, counted in cells: sines and cosines of `E / 2`
    frequencies.

    The frequencies are spaced evenly, unlike those for text, so that the vectors of any two cells are nearly
    orthogonal. The places are a ring of `E`. In training a strip begins at a random place, `first`, so that all places
    are trained alike (as in CAPE, arXiv 2106.03143).
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.first = 0
        self.cells = torch.empty(0, embed_dim)

    def begin(self, cells: int, anywhere: bool, device: torch.device) -> None:
        """Prepares the vectors of a strip of `cells` cells. Raises ValueError for more cells than places."""
        if cells > self.embed_dim:
            raise ValueError(f"images: expected at most {self.embed_dim - 1} digits, got {cells - 1}")
        self.first = int(torch.randint(self.embed_dim, ())) if anywhere else 0
        self.cells = self.vectors(torch.arange(cells, device=device))

    def vectors(self, places: Tensor) -> Tensor:
        """The vectors `[..., E]` of places `[...]` counted from the first cell; whole numbers are middles of cells."""
        frequencies = torch.arange(1, self.embed_dim // 2 + 1, device=places.device) * (2 * torch.pi / self.embed_dim)
        angles = (self.first + places).unsqueeze(-1) * frequencies
        return torch.cat((angles.sin(), angles.cos()), -1)

    def forward(self, x: Tensor, step: TokenPositions) -> Tensor:
        """Tokens `x` `[B, L, E]`, each with the vector of its cell added."""
        positions = step.token_positions
        return x + (
            self.cells[positions.start : positions.stop] if isinstance(positions, range) else self.cells[positions]
        )


class DigitReader(nn.Module):
    """Images `[B, cell, n * cell]` to `n` digits each, for any `n` below `width`."""

    def __init__(self, size: Size, dropout: float = 0.1) -> None:
        super().__init__()
        self.size = size
        self.convolution = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d((2, 1)),  # of the rows only: the encoder reads a vector per column
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.Dropout(dropout),
        )
        # The norm scales the image vectors to about the size of the position vectors.
        self.column = nn.Sequential(nn.Linear(64 * (size.cell // 2), size.width), RMSNorm(size.width))
        self.transformer = EncoderDecoderTransformer(
            None,  # sources are vectors
            STOP + 1,
            size.width,
            size.heads,
            size.hidden,
            size.encoder_layers,
            num_decoder_layers=size.decoder_layers,
            position="rotary",
            dropout=dropout,
            start_token=START,
            stop_tokens=(STOP,),
        )
        self.places = self.transformer.target_positions.positions = Places(size.width)
        for block in self.transformer.encoder.blocks:
            block.attention.window_size = size.cell + 1  # a cell to each side
        for block in self.transformer.decoder.blocks:
            query, key = block.cross_attention.q_proj.weight, block.cross_attention.k_proj.weight
            with torch.no_grad():
                # Equal, so that a place attends to itself; doubled, so that its score is clearly the highest.
                key.copy_(query.mul_(2.0))

    def see(self, images: Tensor) -> Tensor:
        """The columns `[B, S, E]` that the encoder reads: of `images`, and of an empty cell that ends them."""
        images = F.pad(images, (0, self.size.cell))
        seen = self.convolution(images.unsqueeze(1)).permute(0, 3, 1, 2).flatten(2)
        places = (torch.arange(images.shape[-1], device=images.device) + 0.5) / self.size.cell - 0.5
        return self.column(seen) + self.places.vectors(places)

    def forward(self, images: Tensor, digits: Tensor) -> Tensor:
        """Logits `[B, n + 1, V]` of each digit and the stop, each after the true ones before it, int64 `[B, n]`."""
        self.places.begin(digits.shape[1] + 1, anywhere=self.training, device=images.device)
        return self.transformer(self.see(images), F.pad(digits, (1, 0), value=START))

    @torch.no_grad()
    def read(self, images: Tensor, use_kv_cache: bool = True, **options: Any) -> list[list[int]]:
        """The digits of each strip; `options` are those of generation."""
        cells = images.shape[-1] // self.size.cell + 1
        self.places.begin(cells, anywhere=False, device=images.device)
        source = self.see(images)
        # No strip has more tokens than cells, so the buffers of the caches are allocated once.
        for block in self.transformer.decoder_blocks():
            block.attention.max_cache_length = cells
        written = self.transformer.generate(source, max_new_tokens=cells, use_cache=use_kv_cache, **options).tolist()
        return [row[: row.index(STOP)] if STOP in row else row for row in written]


# --- Files ------------------------------------------------------------------------------------------------------


def weights_of(reader: DigitReader) -> dict[str, Tensor]:
    """The weights by name, as they are saved; the head shares the weight of the embedding, which is saved once."""
    return {f"model.{name}": weight for name, weight in reader.state_dict().items() if name != TIED}


def load_weights(reader: DigitReader, tensors: dict[str, Tensor]) -> None:
    """Loads the weights of a file into the reader. Raises RuntimeError if they have another size."""
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    weights[TIED] = weights.get("transformer.target_embedding.tokens.weight", torch.empty(0))
    reader.load_state_dict(weights)


def size_of(reader: DigitReader) -> str:
    """The size as JSON, which `load` needs in addition to the weights."""
    return json.dumps(asdict(reader.size))


def load(path: Path) -> DigitReader:
    """The reader in a file that `train.py` wrote, in `eval()`; the program exits if the file has none."""
    from safetensors import SafetensorError, safe_open  # here, so that `--help` needs no extra

    try:
        with safe_open(path, framework="pt") as file:
            reader = DigitReader(Size(**json.loads(file.metadata()["size"])))
            load_weights(reader, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{path}: expected a reader that train.py saved ({error})") from error
    return reader.eval()
