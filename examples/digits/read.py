"""Strips of held-out handwritten digits with the answers of the trained reader.

python examples/digits/read.py, after train.py
"""

import argparse
from pathlib import Path

import torch

from model import load
from strips import Strips, held_out_strips, load_scans
from transformer.extras import require


def draw(path: Path, strips: Strips, answers: list[list[int]]) -> None:
    """Draws the strips, each with its answer; a wrong answer is bold and red, with the right digits."""
    from matplotlib.figure import Figure  # here, so that `--help` needs no extra

    count, length = strips.digits.shape
    figure = Figure(figsize=(max(5.0, 2 + 0.8 * length), 0.6 + 0.7 * count), layout="constrained")
    figure.suptitle("Held-out strips and the reader's answers (red: wrong)")
    for axes, image, digits, answer in zip(
        figure.subplots(count, squeeze=False)[:, 0], strips.images, strips.digits.tolist(), answers, strict=True
    ):
        axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.yaxis.set_label_position("right")
        text, style = "".join(map(str, answer)), {"color": "black"}
        if answer != digits:
            text, style = f"{text}, is {''.join(map(str, digits))}", {"color": "red", "weight": "bold"}
        axes.set_ylabel(text, rotation=0, ha="left", va="center", family="monospace", fontsize="x-large", **style)
    figure.savefig(path, dpi=100, bbox_inches="tight")  # the answers may need more room
    print(f"\nthe strips beside their answers: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    file_help = "what train.py saved (default: %(default)s)"
    data_help = "folder with the files of MNIST (default: scikit-learn's digits)"
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=Path("digits.safetensors"), help=file_help)
    parser.add_argument("--data", type=Path, metavar="DIR", help=data_help)
    parser.add_argument("--digits", type=int, default=5, help="digits of a strip (default: %(default)s)")
    parser.add_argument("--strips", type=int, default=10, help="strips to read (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the strips (default: %(default)s)")
    parser.add_argument("--no-kv-cache", action="store_true", help="read without caches")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", default=Path("digits.png"), help="(default: %(default)s)"
    )
    options = parser.parse_args()
    require("examples", "matplotlib", "safetensors", *["sklearn"] * (options.data is None))

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
    right = sum(answer == digits for answer, digits in zip(answers, strips.digits.tolist(), strict=True))
    print(f"Shown: {right} of {len(answers)} strips of held-out scans are read without an error.")


if __name__ == "__main__":
    main()
