"""Training of a reader of digit strips, and its accuracy on held-out scans.

    python examples/digits/train.py                            # under six minutes on two cores
    python examples/digits/train.py --resume                   # continues an interrupted training
    python examples/digits/train.py --data DIR --epochs 50     # from MNIST's own files

An epoch is 100 batches of random strips. Its random numbers follow from the seed and the number of the epoch, so a
resumed training gives the same weights as one without an interruption.
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import DigitReader, Size, load_weights, size_of, weights_of
from strips import STOP, Scans, held_out_strips, load_scans, training_strips
from transformer.extras import require

BATCHES = 100  # of an epoch
JUDGED = 3000  # held-out digits, at least, that the accuracy at a length is measured with
NEEDED = {"digits": 0.99, "strips": 0.95}  # shares of held-out strips of 5 digits that --check asks for


class Training:
    """A reader, its optimizers, the plan of its training, and the number of finished epochs."""

    def __init__(self, size: Size, epochs: int, batch_size: int, longest: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.plan = {"epochs": epochs, "batch_size": batch_size, "longest": longest, "seed": seed}
        self.epochs_done = 0
        self.reader = DigitReader(size)
        layers = nn.ModuleList([self.reader.column, self.reader.transformer.encoder, self.reader.transformer.decoder])
        matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
        others = [weight for weight in self.reader.parameters() if all(weight is not matrix for matrix in matrices)]
        # Muon is for the matrices of hidden layers, and learns several times as much from a step as AdamW.
        self.optimizers = {
            "muon": torch.optim.Muon(matrices, lr=0.03, weight_decay=0.05),
            "adamw": torch.optim.AdamW(others, lr=0.002, betas=(0.9, 0.98), weight_decay=0.01),
        }
        self.peaks = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}

    def run_epoch(self, scans: Scans) -> float:
        """Trains on 100 batches, and gives their mean loss in bits per token."""
        self.reader.train()
        generator = torch.manual_seed(1_000_000 * self.plan["seed"] + self.epochs_done + 1)
        losses = []
        for batch in range(BATCHES):
            # A short warm-up, then a linear decay to zero.
            share = (self.epochs_done + batch / BATCHES) / self.plan["epochs"]
            for name, optimizer in self.optimizers.items():
                optimizer.param_groups[0]["lr"] = self.peaks[name] * min(1.0, 0.05 + share / 0.05) * (1 - share)
            strips = training_strips(scans, self.plan["batch_size"], self.plan["longest"], generator)
            logits = self.reader(strips.images, strips.digits)
            wanted = F.pad(strips.digits, (0, 1), value=STOP)
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), label_smoothing=0.05)
            self.reader.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.reader.parameters(), 1.0)
            for optimizer in self.optimizers.values():
                optimizer.step()
            losses.append(loss.item())
        self.epochs_done += 1
        return sum(losses) / BATCHES / math.log(2)

    def save(self, path: Path) -> None:
        """Saves weights, optimizers and plan in one file; the old file stays until the new one is complete."""
        from safetensors.torch import save_file  # here, so that `--help` needs no extra

        tensors = weights_of(self.reader)
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        plan = json.dumps(self.plan)
        unfinished = path.with_name(f"{path.name}.part")
        save_file(tensors, unfinished, {"size": size_of(self.reader), "plan": plan, "done": str(self.epochs_done)})
        os.replace(unfinished, path)

    @classmethod
    def resume(cls, path: Path) -> "Training":
        """The training that `save` wrote; the program exits if the file has none."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
            training = cls(Size(**json.loads(facts["size"])), **json.loads(facts["plan"]))
            load_weights(training.reader, tensors)
            training.epochs_done = int(facts["done"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
            raise SystemExit(f"{path}: expected a training that train.py saved ({error})") from error
        for name, optimizer in training.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for full_name, value in tensors.items():
                if full_name.startswith(f"{name}."):
                    _, index, key = full_name.split(".")
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return training


def judge(reader: DigitReader, scans: Scans, length: int, use_kv_cache: bool) -> dict[str, float]:
    """Shares of digits and of whole strips that are read right; all held-out scans are used equally often."""
    strips = held_out_strips(scans, length, times=-(-JUDGED // len(scans)))
    reader.eval()
    read = [row for images in strips.images.split(100) for row in reader.read(images, use_kv_cache)]
    pairs = list(zip(read, strips.digits.tolist(), strict=True))
    # A digit counts only at its own place: a missing digit makes the following digits wrong.
    right = sum(digit == wanted for row, truth in pairs for digit, wanted in zip(row, truth, strict=False))
    return {"digits": right / strips.digits.numel(), "strips": sum(row == truth for row, truth in pairs) / len(pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with the files of MNIST (default: scikit-learn's digits)"
    )
    parser.add_argument("--epochs", type=int, default=20, help="epochs of 100 batches (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="strips per batch (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=10, help="most digits of a strip (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--no-kv-cache", action="store_true", help="measure the accuracy without caches")
    file_help = "where the training is saved (default: %(default)s)"
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=Path("digits.safetensors"), help=file_help)
    parser.add_argument("--resume", action="store_true", help="continue the training in the checkpoint, by its plan")
    parser.add_argument("--check", action="store_true", help="fail below 99%% of digits or 95%% of strips of 5")
    options = parser.parse_args()
    require("examples", "tqdm", "safetensors", *["sklearn"] * (options.data is None))
    from tqdm import tqdm

    if min(options.epochs, options.batch_size, options.longest) < 1:
        parser.error("--epochs, --batch-size, --longest: expected at least 1 of each")
    if not options.checkpoint.parent.is_dir():
        parser.error(f"--checkpoint: expected a file in a folder that exists, got {options.checkpoint.parent}")

    torch.set_num_threads(min(2, torch.get_num_threads()))  # tensors this small gain nothing from more
    scans, held_out = load_scans(options.data)
    if options.resume:
        training = Training.resume(options.checkpoint)
        if training.reader.size.cell != scans.cell:
            cell = training.reader.size.cell
            parser.error(f"--data: expected scans for cells of {cell} pixels, as at first, got {scans.cell}")
    else:
        training = Training(Size(scans.cell), options.epochs, options.batch_size, options.longest, options.seed)
    parameters = sum(weight.numel() for weight in training.reader.parameters())
    print(f"{parameters:,} parameters; {len(scans):,} scans to learn from, {len(held_out):,} held out", flush=True)

    epochs = training.plan["epochs"]
    with tqdm(total=epochs, initial=training.epochs_done, desc="training", unit="epoch") as bar:
        while training.epochs_done < epochs:
            loss = training.run_epoch(scans)
            training.save(options.checkpoint)
            bar.set_postfix_str(f"{loss:.3f} bits per token", refresh=False)
            bar.update()

    print(f"\nheld-out strips, read after training with 1 to {training.plan['longest']} digits:\n")
    print("    digits    digits right    strips right")
    shares = {}
    for length in (5, 10, 12, 20):
        shares[length] = judge(training.reader, held_out, length, not options.no_kv_cache)
        print(f"{length:10}{shares[length]['digits']:16.2%}{shares[length]['strips']:16.2%}", flush=True)
    print(f"\nsaved: {options.checkpoint}")
    print(f"Shown: of held-out scans, {shares[5]['digits']:.1%} of the digits are read right", end="")
    print(f" in strips of 5,\nand {shares[20]['digits']:.1%} in strips of 20", end="")
    print(f" (at most {training.plan['longest']} in training).")
    if options.check and any(shares[5][what] < least for what, least in NEEDED.items()):
        raise SystemExit(
            f"expected at least {NEEDED['digits']:.0%} of the digits and {NEEDED['strips']:.0%} of the "
            "strips of 5 right"
        )


if __name__ == "__main__":
    main()
