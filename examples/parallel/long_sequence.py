"""Long sequence on several processes: each has a part of its tokens and of its keys, and prints its memory.

torchrun --nproc-per-node 4 examples/parallel/long_sequence.py --tokens 100000
"""

import argparse
import math
import os
import resource
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from transformer import DecoderOnlyTransformer
from transformer.kernels import warm_up
from transformer.parallel import parts_of, share_sequence

VOCABULARY, WIDTH, HEADS, GROUPS, LAYERS = 256, 64, 4, 2, 2


def megabytes() -> float:
    """The largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def say(text: str) -> None:
    """Prints a line for this rank, in the order of the ranks."""
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            print(f"rank {rank}: {text}", flush=True)
        dist.barrier()


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tokens", type=int, default=20_000, help="tokens of the sequence")
parser.add_argument("--new", type=int, default=32, help="tokens that are generated after it")
parser.add_argument("--train", action="store_true", help="one step of training over the sequence, too")
arguments = parser.parse_args()
if arguments.tokens < 1 or arguments.new < 1:
    parser.error("--tokens and --new: expected at least 1")

torch.set_num_threads(1)
# Alone, `python long_sequence.py` is one rank.
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29531")
dist.init_process_group("gloo", rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1)))
ranks = dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sequence",))

torch.manual_seed(0)  # The same weights, and the same tokens, on every rank.
model = DecoderOnlyTransformer(
    VOCABULARY, WIDTH, HEADS, 2 * WIDTH, LAYERS, attention="gqa", num_groups=GROUPS, position="rotary"
)
warm_up(model)
ids = torch.randint(VOCABULARY, (1, arguments.tokens))
before = megabytes()

model.eval().enable_cache()
with share_sequence(model, mesh):
    began = time.perf_counter()
    model.generate(ids, max_new_tokens=1)
    prefill = time.perf_counter() - began
    new = model.generate(ids[:, -1:], max_new_tokens=arguments.new)
    decode = time.perf_counter() - began - prefill
cache = model.kv_cache
bytes_of_all = cache.length * LAYERS * 2 * GROUPS * (WIDTH // HEADS) * 4
say(
    f"{cache.cached_length:,} of {cache.length:,} tokens cached, {cache.nbytes:,} bytes of {bytes_of_all:,}; "
    f"{megabytes():.0f} MiB at most, {before:.0f} before the sequence"
)
digests = [torch.empty_like(new) for _ in range(ranks)]
dist.all_gather(digests, new)
if not all(torch.equal(each, new) for each in digests):
    raise SystemExit("the ranks wrote different tokens")
if dist.get_rank() == 0:
    print(f"prompt read in {prefill:.1f} s, {1000 * decode / (arguments.new + 1):.1f} ms a token; equal on all ranks")

if arguments.train:
    # As many tokens as make equal parts, and one more for the targets.
    length = (arguments.tokens - 1) // (2 * ranks) * 2 * ranks
    model.disable_cache().train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    began = time.perf_counter()
    with share_sequence(model, mesh):
        logits = wrapped(parts_of(ids[:, :length], mesh))
        loss = F.cross_entropy(logits.flatten(0, 1), parts_of(ids[:, 1 : length + 1], mesh).flatten())
        loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    bits = total.item() / ranks / math.log(2)
    seconds = time.perf_counter() - began
    say(f"one step over {length:,} tokens: {logits.shape[1]:,} here, {seconds:.1f} s, {megabytes():.0f} MiB at most")
    if dist.get_rank() == 0:
        print(f"the loss is {bits:.2f} bits a token")
dist.destroy_process_group()
