"""Many documents of any length, scored by a sliding window: in a plain loop, and by Ray Data on several processes.

    python examples/parallel/documents.py                   # about a minute on two cores
    python examples/parallel/documents.py --ray             # the same on two workers of Ray: equal results
    python examples/parallel/documents.py --ray --workers 16 --documents FOLDER --model FOLDER

`Scorer` is a callable class, from a batch to a batch, that loads its model once. A plain loop calls it, and
`map_batches` of Ray Data takes it as it is. Memory does not grow with a document, because each is read in chunks
through the window of the model. A worker that dies is started again by Ray, and its batches are scored once more.

The model predicts bytes: `language_model.py --save FOLDER` writes one, and without `--model` one is trained here. A
document's score is the mean number of bits that each of its bytes costs the model.
"""

import argparse
import email
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import byte_model
from byte_model import bits_per_byte, load, load_or_train
from transformer.checkpoints import save_model
from transformer.extras import require

# Documents in a call of the scorer, and bytes in the window of a model that is trained here.
BATCH, WINDOW = 4, 128

Row = Mapping[str, Any]
Batch = Mapping[str, Sequence[Any]]


class Scorer:
    """Scores batches of documents with the model in a folder."""

    def __init__(self, folder: str) -> None:
        # Each worker has a core of its own, and tensors this small gain little from more.
        torch.set_num_threads(1)
        self.model = load(Path(folder))

    def __call__(self, batch: Batch) -> dict[str, Sequence[Any]]:
        """The columns `name`, `bytes` and `bits` (bits per byte) of documents with the columns `name` and `text`."""
        texts = [torch.tensor(list(text.encode())) for text in batch["text"]]
        # The first byte is given, so a document of one byte or none costs nothing.
        bits = [bits_per_byte(self.model, text, cut=1)[0] if len(text) > 1 else 0.0 for text in texts]
        return {"name": batch["name"], "bytes": [len(text) for text in texts], "bits": bits}


def batches(rows: Sequence[Row]) -> Iterator[Batch]:
    """The rows in batches, each as columns."""
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        yield {name: [row[name] for row in some] for name in some[0]}


def by_loop(folder: Path, rows: Sequence[Row]) -> dict[str, float]:
    """The bits per byte of each document, by its name."""
    from tqdm import tqdm  # here, so that `--help` needs no extra

    scorer, bits = Scorer(str(folder)), {}
    for batch in tqdm(list(batches(rows)), desc="plain loop", unit="batch"):
        scored = scorer(batch)
        bits |= zip(scored["name"], scored["bits"], strict=True)
    return bits


def by_ray(folder: Path, rows: Sequence[Row], workers: int, scorer: type[Scorer] = Scorer) -> dict[str, float]:
    """The same on workers of Ray: those of the cluster that RAY_ADDRESS names, else processes on this machine."""
    import ray

    # Workers do not find the modules of this folder and of the one above: their code is sent to them.
    ray.cloudpickle.register_pickle_by_value(byte_model)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"address": "local", "num_cpus": workers, "object_store_memory": 1 << 28, "include_dashboard": False}
    ray.init(log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else local))
    try:
        scored = ray.data.from_items(list(rows)).map_batches(
            scorer,
            fn_constructor_args=[str(folder)],
            batch_size=BATCH,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        return {row["name"]: row["bits"] for row in scored.iter_rows()}
    finally:
        ray.shutdown()


def timed(what: str, rows: Sequence[Row], bits: dict[str, float], began: float) -> None:
    count = sum(len(row["text"].encode()) for row in rows)
    print(f"    {what:<12} {len(bits)} documents, {count / (time.perf_counter() - began):,.0f} bytes/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score documents of any length, in a loop or by Ray Data.")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model that language_model.py --save wrote")
    parser.add_argument("--steps", type=int, default=200, help="training steps without --model (default: %(default)s)")
    parser.add_argument(
        "--documents", type=Path, metavar="FOLDER", help="text files (default: the sources of Python's email package)"
    )
    parser.add_argument("--ray", action="store_true", help="score them by Ray Data as well, and compare")
    parser.add_argument("--workers", type=int, default=2, help="processes of Ray (default: %(default)s)")
    options = parser.parse_args()
    folder = options.documents or Path(email.__file__).parent
    if options.steps < 1 or options.workers < 1:
        parser.error("--steps, --workers: expected at least 1")
    if not folder.is_dir():
        parser.error(f"--documents: expected a folder, got {folder}")
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    if not paths:
        parser.error(f"--documents: expected a folder with files, got {folder}")
    require("ray", *["ray"] * options.ray, "safetensors", "tqdm")

    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [{"name": path.name, "text": path.read_text("utf-8", "replace")} for path in paths]
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model and options.model.resolve()
        if model is None:
            model = Path(temporary, "model")
            save_model(load_or_train(None, WINDOW, options.steps), model)
        sizes = [len(row["text"].encode()) for row in rows]
        print(f"{len(rows)} documents of {min(sizes):,} to {max(sizes):,} bytes")
        began = time.perf_counter()
        bits = by_loop(model, rows)
        timed("plain loop", rows, bits, began)
        if options.ray:
            began = time.perf_counter()
            again = by_ray(model, rows, options.workers)
            timed(f"Ray, {options.workers}", rows, again, began)
            if again != bits:
                raise SystemExit("Ray's workers gave other scores than the plain loop")
            print("    both gave the same scores")
    ordered = sorted(bits, key=bits.__getitem__)
    print("\nbits per byte, the most expected documents first:")
    for name in dict.fromkeys([*ordered[:3], *ordered[-3:]]):
        print(f"    {bits[name]:5.2f}  {name}")
    print(f"\nShown: one callable class scored {len(bits)} documents of any length", end="")
    print(", in a plain loop and on workers of Ray, with equal results." if options.ray else ", in a plain loop.")


if __name__ == "__main__":
    main()
