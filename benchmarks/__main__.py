"""Runs every comparison and prints its table: `python -m benchmarks [NAME ...]`."""

import argparse
import platform

import torch
import transformers

from . import checkpoints, decode_step, generation, recomputing, stack, streaming, umt5, windowed_prefill

COMPARISONS = {
    "decode_step": decode_step.run,
    "recomputing": recomputing.run,
    "stack": stack.run,
    "generation": generation.run,
    "checkpoints": checkpoints.run,
    "windowed_prefill": windowed_prefill.run,
    "streaming": streaming.run,
    "umt5": umt5.run,
}


def main() -> None:
    """Runs the comparisons named on the command line, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *COMPARISONS], help="comparisons to run; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    print(
        f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{arguments.threads} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    for name in arguments.names or COMPARISONS:
        COMPARISONS[name]()


if __name__ == "__main__":
    main()
