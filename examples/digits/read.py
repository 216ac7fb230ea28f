"""Reads strips of handwritten digits that the reader has never seen, and draws each beside its answer.

python examples/digits/read.py, after train.py
"""

import argparse
from pathlib import Path

import torch

from model import load
from strips import Strips, held_out_strips, load_scans


def draw(path: Path, strips: Strips, answers: list[list[int]]) -> None:
    """The strips, each with what was read, in red where that is wrong."""
    from matplotlib.figure import Figure  # here, since nothing else needs it

    count, length = strips.digits.shape
    figure = Figure(figsize=(1 + 0.6 * length, 0.7 * count), layout="constrained")
    for axes, image, digits, answer in zip(
        figure.subplots(count, squeeze=False)[:, 0], strips.images, strips.digits.tolist(), answers, strict=True
    ):
        axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.yaxis.set_label_position("right")
        text, color = "".join(map(str, answer)), "black" if answer == digits else "red"
        axes.set_ylabel(text, rotation=0, ha="left", va="center", color=color, family="monospace", fontsize="x-large")
    figure.savefig(path, dpi=100)
    print(f"\nthe strips beside their answers: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=Path("digits.safetensors"))
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's files (default: scikit-learn's digits)")
    parser.add_argument("--digits", type=int, default=5, help="of a strip (default: %(default)s)")
    parser.add_argument("--strips", type=int, default=10, help="how many to read (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (default: %(default)s)")
    parser.add_argument("--no-kv-cache", action="store_true", help="read without caches")
    parser.add_argument("--picture", type=Path, metavar="FILE", default=Path("digits.png"))
    options = parser.parse_args()

    torch.set_num_threads(1)
    reader = load(options.checkpoint)
    _, scans = load_scans(options.data)
    if scans.cell != reader.size.cell:
        parser.error(f"--data: expected scans for cells of {reader.size.cell} pixels, got {scans.cell}")
    if not 1 <= options.digits < reader.size.width or options.strips < 1:
        parser.error(f"--digits, --strips: expected 1 to {reader.size.width - 1} digits and at least 1 strip")
    times = -(-options.digits * options.strips // len(scans))
    strips = held_out_strips(scans, options.digits, times, options.seed)
    strips = Strips(strips.images[: options.strips], strips.digits[: options.strips])
    answers = reader.read(strips.images, not options.no_kv_cache)
    for digits, answer in zip(strips.digits.tolist(), answers, strict=True):
        wrong = "" if answer == digits else f"    wrong, it is {''.join(map(str, digits))}"
        print("".join(map(str, answer)) + wrong)
    draw(options.picture, strips, answers)


if __name__ == "__main__":
    main()
