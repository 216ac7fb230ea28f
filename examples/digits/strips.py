"""Strips of handwritten digits: scans in adjacent cells, as in the boxes of a form.

Images come from scikit-learn's `load_digits`, 1,797 of 8 x 8 pixels, or from the files of MNIST. They are split before
they are joined: no scan of the training is in a strip that a model is tested with.
"""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 300  # scans of load_digits; MNIST comes split
STOP = START = 10  # the token after the last digit, and the one before the first


@dataclass(frozen=True)
class Scans:
    """Single digits: images `[N, side, side]` from 0 (paper) to 1 (ink), and their digits, int64 `[N]`."""

    images: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)

    @property
    def cell(self) -> int:
        """Height and width of a digit's cell: its image, and a pixel of room on each side."""
        return self.images.shape[-1] + 2


@dataclass(frozen=True)
class Strips:
    """Strips of one length `n`: images `[B, cell, n * cell]`, and their digits, int64 `[B, n]`."""

    images: Tensor
    digits: Tensor


# --- Scans ------------------------------------------------------------------------------------------------------


def load_scans(folder: Path | None) -> tuple[Scans, Scans]:
    """Scans to learn from, and held-out ones: scikit-learn's, or those of a folder with MNIST's four files."""
    if folder is not None:
        return read_mnist(folder, "train"), read_mnist(folder, "t10k")
    from sklearn.datasets import load_digits  # here, since MNIST needs none of it

    scans = load_digits()
    images, digits = torch.from_numpy(scans.images).float() / 16, torch.from_numpy(scans.target).long()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    held_out, learnt = order[:HELD_OUT], order[HELD_OUT:]
    return Scans(images[learnt], digits[learnt]), Scans(images[held_out], digits[held_out])


def read_mnist(folder: Path, part: str) -> Scans:
    """The scans of one part, "train" or "t10k", of MNIST as it is handed out: idx files, as .gz or unpacked."""
    images, digits = (read_idx(folder, f"{part}-{name}") for name in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    if images.ndim != 3 or images.shape[1] != images.shape[2] or digits.shape != images.shape[:1]:
        shapes = f"{list(images.shape)} and {list(digits.shape)}"
        raise SystemExit(f"{folder}: expected {part} images [N, side, side] and labels [N], got {shapes}")
    return Scans(images.float() / 255, digits.long())


def read_idx(folder: Path, name: str) -> Tensor:
    """The bytes of an idx file as uint8: two zeros, the type, the number of dimensions, the sizes, the numbers."""
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise SystemExit(f"{folder}: expected {name} or {name}.gz, as MNIST is handed out")
    try:
        raw = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
        zeros, kind, dimensions = struct.unpack_from(">HBB", raw)
        sizes = struct.unpack_from(f">{dimensions}I", raw, 4)
        if (zeros, kind) != (0, 8):
            raise ValueError(f"it begins with {raw[:3].hex(' ')}")
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * dimensions).view(sizes)
    except (OSError, EOFError, struct.error, ValueError, RuntimeError) as error:
        raise SystemExit(f"{found[0]}: expected an idx file of bytes ({error})") from error


# --- Strips -----------------------------------------------------------------------------------------------------


def join(scans: Scans, rows: Tensor, generator: torch.Generator) -> Strips:
    """The scans numbered `rows` `[B, n]` as strips, each shifted in its cell by up to a pixel up, down, left, right."""
    count, length = rows.shape
    side, cell = scans.cell - 2, scans.cell
    corners = torch.randint(3, (2, count, length, 1, 1), generator=generator)
    offsets = torch.arange(side)
    down, right = corners[0] + offsets.view(-1, 1), corners[1] + offsets.view(1, -1)
    cells = torch.zeros(count, length, cell * cell)
    cells.scatter_(2, (down * cell + right).flatten(-2), scans.images[rows].flatten(-2))
    images = cells.view(count, length, cell, cell).transpose(1, 2).reshape(count, cell, length * cell)
    return Strips(images, scans.digits[rows])


def training_strips(scans: Scans, count: int, longest: int, generator: torch.Generator) -> Strips:
    """Strips of one random length from 1 to `longest`, without padding, of random scans."""
    length = int(torch.randint(1, longest + 1, (), generator=generator))
    return join(scans, torch.randint(len(scans), (count, length), generator=generator), generator)


def held_out_strips(scans: Scans, length: int, times: int, seed: int = 0) -> Strips:
    """Strips of `length` digits in which each scan occurs about `times` times, in shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(scans), generator=generator) for _ in range(times)])
    return join(scans, order[: len(order) // length * length].view(-1, length), generator)
