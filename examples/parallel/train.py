"""Training of a byte-level language model in several processes, by data and by tensor parallelism.

    python examples/parallel/train.py --folder run                                          # one process
    torchrun --nproc-per-node 4 examples/parallel/train.py --folder run --data 2 --tensor 2

`--data` groups of processes read different rows of a batch and share the weights among them (FSDP2). `--tensor`
processes share the heads and hidden units of each layer. Both numbers give the same losses as one process, up to
rounding. The model and the text are those of `language_model.py`.

A checkpoint is written beside its place and then renamed, so it is complete or not there. A run that was killed goes on
from the newest one when it is started again, also with other numbers of processes, and gives the losses of a run that
was never interrupted: the rows of a step follow from the seed and the number of the step.
"""

import argparse
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the model and the text of other examples are
from byte_model import bits_per_byte, new_model
from byte_text import random_rows, read_bytes
from transformer import DecoderOnlyTransformer
from transformer.extras import require
from transformer.parallel import parallelize

LENGTH = 128  # bytes of a row, and the window


class Training:
    """A parallel model, its optimizer, and the number of steps that are done."""

    def __init__(self, mesh: DeviceMesh, device: torch.device, plan: dict[str, int]) -> None:
        self.mesh, self.device, self.plan = mesh, device, plan
        self.done = 0
        torch.manual_seed(plan["seed"])  # all processes begin with the same numbers
        self.model = new_model("gqa", groups=2, window=LENGTH).to(device)
        if mesh["tensor"].size() > 1:
            parallelize(self.model, mesh["tensor"])
        for block in self.model.decoder.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(self.model, mesh=mesh["data"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)

    def step(self, text: Tensor) -> float:
        """One step on the rows of this process; gives the loss over all rows, in bits per byte."""
        share = self.done / self.plan["steps"]
        for group in self.optimizer.param_groups:  # a short warm-up, then a linear decay to zero
            group["lr"] = 0.003 * min(1.0, 0.1 + share / 0.03) * (1 - share)
        generator = torch.Generator().manual_seed(1_000_000 * self.plan["seed"] + self.done)
        data = self.mesh["data"]
        rows = random_rows(text, self.plan["rows"], LENGTH, generator)
        rows = rows.chunk(data.size())[data.get_local_rank()].to(self.device)
        loss = F.cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        total = loss.detach()
        dist.all_reduce(total, group=data.get_group())
        return total.item() / data.size() / math.log(2)

    def save(self, folder: Path) -> None:
        """Writes a checkpoint that is complete or not there, and removes the one before it."""
        unfinished, place = folder / f"{self.done:06}.part", folder / f"step-{self.done:06}"
        dcp.save(self._state(), checkpoint_id=unfinished)
        if dist.get_rank() == 0:
            unfinished.rename(place)
            for other in set(folder.glob("step-*")) - {place}:
                shutil.rmtree(other)

    def resume(self, folder: Path) -> None:
        """Continues from the newest checkpoint of a folder, where it has one."""
        # No process writes before all have read: the first step waits for all of them.
        newest = max(folder.glob("step-*"), default=None)
        if newest is None:
            return
        state = self._state()
        dcp.load(state, checkpoint_id=newest)
        if state["plan"] != self.plan:
            raise SystemExit(f"{newest}: expected a training with {self.plan}, got {state['plan']}")
        weights, moments = state["model"], state["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=moments)
        self.done = state["done"]

    def _state(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": moments, "done": self.done, "plan": self.plan}


def join_processes() -> torch.device:
    """Joins the processes that torchrun started, or begins a group of one; gives the device of this process."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def train(training: Training, text: Tensor, folder: Path, every: int) -> None:
    """Runs the steps that are left, and writes a checkpoint after each `every` of them and after the last."""
    from tqdm import tqdm  # here, so that `--help` needs no extra

    steps, first = training.plan["steps"], dist.get_rank() == 0
    losses: list[float] = []
    training.model.train()
    with tqdm(total=steps, initial=training.done, desc="training", unit="step", disable=not first) as bar:
        while training.done < steps:
            losses.append(training.step(text))
            bar.update()
            if training.done % every == 0 or training.done == steps:
                training.save(folder)
                if first:
                    bar.write(f"step {training.done:6}: {sum(losses) / len(losses):.4f} bits per byte")
                losses.clear()


def show(model: DecoderOnlyTransformer, text: Tensor, cut: int, prompt: str, count: int) -> None:
    """Prints the bits per byte of the held-out text, and a continuation of the prompt. All processes compute them."""
    bits, _ = bits_per_byte(model, text, cut)
    ids = torch.tensor([list(prompt.encode())], device=text.device)
    written = model.generate(ids, max_new_tokens=count)[0].tolist()
    if dist.get_rank() == 0:
        print(f"{bits:.2f} bits per byte of held-out text; {count} bytes after {prompt!r}:\n")
        print(bytes(written).decode("utf-8", "replace"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small language model in several processes.")
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoints; a killed run continues there")
    parser.add_argument("--data", type=int, help="groups of processes that share the rows (default: all)")
    parser.add_argument("--tensor", type=int, default=1, help="processes that share each layer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step, of all processes (default: %(default)s)")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to learn (default: Python's own reference)")
    parser.add_argument("--prompt", default="When a function is called, ", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="bytes to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    require("examples", "tqdm")

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    data = options.data or processes // max(1, options.tensor)
    if data * options.tensor != processes:
        parser.error(
            f"--data, --tensor: expected numbers whose product is {processes}, the number of processes, got {data} and "
            f"{options.tensor}; start more of them with torchrun --nproc-per-node"
        )
    if options.rows < 1 or options.rows % data:
        parser.error(f"--rows: expected a multiple of --data={data}, got {options.rows}")
    if min(options.steps, options.every, options.tokens, len(options.prompt)) < 1:
        parser.error("--steps, --every, --tokens, --prompt: expected at least one of each")
    text, cut = read_bytes(options.text)
    if cut <= LENGTH:
        parser.error(f"--text: expected more than {LENGTH * 20 // 19} bytes, got {len(text)}")

    torch.set_num_threads(1)  # tensors this small gain little from more
    device = join_processes()
    mesh = init_device_mesh(device.type, (data, options.tensor), mesh_dim_names=("data", "tensor"))
    plan = {"steps": options.steps, "rows": options.rows, "seed": options.seed, "bytes": cut}
    training = Training(mesh, device, plan)
    options.folder.mkdir(parents=True, exist_ok=True)
    training.resume(options.folder)
    if dist.get_rank() == 0:
        for unfinished in options.folder.glob("*.part"):  # of a run that was killed while it wrote
            shutil.rmtree(unfinished)
        print(f"{data} x {options.tensor} processes; {training.done} of {options.steps} steps are done", flush=True)
    train(training, text[:cut], options.folder, options.every)
    show(training.model, text.to(device), cut, options.prompt, options.tokens)
    dist.barrier()  # a process that ends closes connections that others may still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
