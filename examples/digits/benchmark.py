"""Time to read strips with KV caches and without, by the trained reader and by a large one.

python examples/digits/benchmark.py, after train.py

Without caches the decoder computes all of its tokens again for each digit, and projects the whole strip again in every
layer. The convolution and the encoder run once in both ways; their time is included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model import DigitReader, Size, load
from strips import Scans, join, load_scans
from transformer.extras import require

LENGTHS = (5, 10, 20, 30, 50, 80)
STRIPS, BATCH = 1000, 50  # of mixed lengths
TOGETHER = 8  # strips of one length that the trained reader reads at once
Times = dict[int, tuple[float, float]]  # by length: median seconds with the caches, and without


def median_seconds(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median of each candidate over `rounds`, after a warm-up; measured in turn, so that drift affects all."""
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for way, taken in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def time_lengths(reader: DigitReader, scans: Scans, strips: int, rounds: int, name: str) -> Times:
    """Seconds for the strips of each length in one batch. Nothing stops early: both ways generate a token per digit,
    and one."""
    from tqdm import tqdm  # here, so that `--help` needs no extra

    times, generator = {}, torch.Generator().manual_seed(0)
    for length in tqdm(LENGTHS, desc=name, leave=False):
        images = join(scans, torch.arange(strips * length).view(strips, length) % len(scans), generator).images

        def read(use_kv_cache: bool, images: torch.Tensor = images) -> list[list[int]]:
            return reader.read(images, use_kv_cache, stop_tokens=())

        with_cache, without = median_seconds([lambda: read(True), lambda: read(False)], rounds)
        times[length] = with_cache, without
    return times


def time_mixed(reader: DigitReader, scans: Scans, rounds: int) -> tuple[float, float]:
    """Seconds for 1,000 strips of 1 to 10 digits, in batches of 50 of one length, with the caches and without."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 11, (STRIPS,), generator=generator).sort().values
    batches = []
    for length, count in zip(*(values.tolist() for values in lengths.unique(return_counts=True)), strict=True):
        strips = join(scans, torch.randint(len(scans), (count, length), generator=generator), generator)
        batches += strips.images.split(BATCH)

    def read_all(use_kv_cache: bool) -> list[list[int]]:
        return [row for images in batches for row in reader.read(images, use_kv_cache)]

    same = sum(a == b for a, b in zip(read_all(True), read_all(False), strict=True))
    print(f"{same:,} of {STRIPS:,} strips are read the same with the caches and without")
    with_cache, without = median_seconds([lambda: read_all(True), lambda: read_all(False)], rounds)
    return with_cache, without


def print_table(name: str, times: Times) -> None:
    print(f"\n{name}\n")
    print("| digits | with the caches, ms | without, ms | speed-up |")
    print("| -----: | ------------------: | ----------: | -------: |")
    for length, (with_cache, without) in times.items():
        print(f"| {length:6} | {with_cache * 1000:19,.1f} | {without * 1000:11,.1f} | {without / with_cache:8.2f} |")


def plot(path: Path, tables: dict[str, Times]) -> None:
    """Draws the time against the length of the strips, with caches and without, for each model."""
    from matplotlib.figure import Figure  # here, since only --plot needs it

    figure = Figure(figsize=(4.8 * len(tables), 4.2), layout="constrained")
    figure.suptitle("Time to read strips, with caches and without")
    for axes, (name, times) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        for way, label in ((1, "without caches"), (0, "with caches")):
            axes.plot(list(times), [pair[way] * 1000 for pair in times.values()], marker="o", label=label)
        axes.set(xlabel="length of a strip (digits)", ylabel="time (ms)", ylim=(0, None))
        axes.set_title(name, fontsize="small")
        axes.legend()
    figure.savefig(path, dpi=150)
    print(f"\ntime against length: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    file_help = "what train.py saved (default: %(default)s)"
    data_help = "folder with the files of MNIST (default: scikit-learn's digits)"
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=Path("digits.safetensors"), help=file_help)
    parser.add_argument("--data", type=Path, metavar="DIR", help=data_help)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the time against the length")
    parser.add_argument("--small", action="store_true", help="leave out the large model")
    options = parser.parse_args()
    require("examples", "tqdm", "safetensors", *["sklearn"] * (options.data is None))
    if options.plot:
        require("examples", "matplotlib")
    torch.manual_seed(0)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    _, scans = load_scans(options.data)
    reader = load(options.checkpoint)
    if scans.cell != reader.size.cell:
        parser.error(f"--data: expected scans for cells of {reader.size.cell} pixels, got {scans.cell}")

    with_cache, without = time_mixed(reader, scans, options.rounds)
    print(f"with the caches  {STRIPS / with_cache:8,.0f} strips/s")
    print(f"without          {STRIPS / without:8,.0f} strips/s")
    trained = f"the trained reader, {TOGETHER} strips at once"
    tables = {trained: time_lengths(reader, scans, TOGETHER, 2 * options.rounds, trained)}
    if not options.small:
        large = DigitReader(Size(scans.cell, width=512, heads=16, hidden=1024, encoder_layers=16, decoder_layers=16))
        name = "16 layers and 16 heads, untrained, one strip"
        tables[name] = time_lengths(large.eval(), scans, 1, options.rounds, name)
    for name, times in tables.items():
        print_table(name, times)
    if options.plot:
        plot(options.plot, tables)
    (with_cache, without), longest = tables[trained][LENGTHS[-1]], LENGTHS[-1]
    print(f"\nShown: with its caches the trained reader reads strips of {longest} digits", end=" ")
    print(f"{without / with_cache:.1f} times as fast as without them.")


if __name__ == "__main__":
    main()
