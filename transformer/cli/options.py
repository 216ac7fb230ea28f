"""Options that several commands have."""

import argparse
from typing import Any

import torch

from ..checkpoints import load_model

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and --dtype."""
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a name on the Hugging Face Hub")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights (default: as stored)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and how many."""
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that sum to P")
    parser.add_argument("--seed", type=int, default=0, help="of the dice (default: %(default)s)")


def dtype_of(options: argparse.Namespace) -> torch.dtype | None:
    """What --dtype says; None without it."""
    return None if options.dtype is None else DTYPES[options.dtype]


def loaded(options: argparse.Namespace) -> Any:
    """The model, with its weights."""
    return load_model(options.model, dtype_of(options))


def sampling(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What `add_sampling` has added, as options of `generate` and `stream`."""
    return {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "generator": torch.Generator(device).manual_seed(options.seed),
    }
