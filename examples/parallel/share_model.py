"""A model that the processes of torchrun share: each computes some of the heads, hidden units and tokens.

    torchrun --nproc-per-node 2 examples/parallel/share_model.py

Without torchrun it is one process. Every process prints what it holds, and
the first one the tokens, which are those of one process.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from transformer import DecoderOnlyTransformer
from transformer.parallel import parallelize

PROMPT = [list(b"Attention is all")]


def main() -> None:
    """Generates alone and together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new", type=int, default=12, help="tokens to generate (default: %(default)s)")
    new = parser.parse_args().new
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group()
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    model = DecoderOnlyTransformer(256, 256, 8, 1024, 4, attention="gqa", num_kv_heads=4).to(device).eval()
    prompt = torch.tensor(PROMPT, device=device)
    alone = model.generate(prompt, max_new_tokens=new)

    parallelize(model, init_device_mesh(device, (dist.get_world_size(),)))
    model.enable_cache()
    together = model.generate(prompt, max_new_tokens=new)

    held = sum(each.to_local().numel() for each in model.parameters()) / sum(
        each.numel() for each in model.parameters()
    )
    heads = model.decoder.blocks[0].attention.num_groups
    print(
        f"rank {dist.get_rank()}: {held:.0%} of the weights, {heads} of 4 key/value heads, "
        f"{model.kv_cache.nbytes_used:,} bytes of cache",
        flush=True,
    )
    dist.barrier()
    if dist.get_rank() == 0:
        print(together[0].tolist(), "as alone" if torch.equal(alone, together) else f"alone: {alone[0].tolist()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
