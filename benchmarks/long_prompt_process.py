"""Program of a process that reads one long prompt: peak memory above the weights, in MiB, at each request."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from transformer import DecoderOnlyTransformer
from transformer.kernels import warm_up

MIB = 1024
"""Units of /proc/self/status in a MiB."""

CHUNK, CHUNKS = 256, 3
"""Tokens of a chunk, and chunks, of the prompt that is read before."""


def status(name: str) -> float:
    """A figure of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / MIB


def main(shape: list[int], options: dict[str, Any], tokens: int, threads: int, generation: dict[str, Any]) -> None:
    """Answers each line of the input by the peak of one generation after a prompt of so many tokens."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = DecoderOnlyTransformer(*shape, **options).eval()
    warm_up(model)
    prompt = torch.randint(shape[0], (1, tokens))
    # Chunks after others use kernels that a machine compiles once, which takes memory too.
    model.generate(prompt[:, : CHUNKS * CHUNK], max_new_tokens=2, prefill_chunk_size=CHUNK)
    before = status("VmRSS")
    for _ in sys.stdin:
        # The highest mark begins anew.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        model.generate(prompt, max_new_tokens=16, **generation)
        print(json.dumps(status("VmHWM") - before), flush=True)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
