"""Command line options that several commands share."""

import argparse
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoints import Tokenizer, load_model
from ..errors import ArgumentError
from ..generation import GenerationOptions

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

SAMPLING: dict[str, tuple[type, str, str]] = {
    "max_new_tokens": (int, "N", "maximum number of tokens of an answer (default: 200)"),
    "temperature": (float, "T", "0 takes the most probable token, greater values sample (default: 0)"),
    "top_k": (int, "K", "sample from the K most probable tokens"),
    "top_p": (float, "P", "sample from the most probable tokens whose probabilities sum to P"),
    "min_p": (float, "P", "sample from tokens with at least P times the highest probability"),
    "repetition_penalty": (float, "R", "values above 1 lower the probability of tokens that are in the text"),
}
"""Options of `generate` on the command line: type, placeholder, help."""

DEFAULTS: dict[str, Any] = {"max_new_tokens": 200, "temperature": 0.0}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and --dtype."""
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a name on the Hugging Face Hub")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights (default: as stored)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument("--device", metavar="D", help="where the model runs, such as cpu or cuda (default: PyTorch's)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sampling and the number of tokens."""
    for name, (kind, placeholder, words) in SAMPLING.items():
        parser.add_argument(flag(name), type=kind, metavar=placeholder, help=words)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="text that ends an answer; may be repeated")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")


def flag(name: str) -> str:
    """The name of an option of `generate` on the command line."""
    return f"--{name.replace('_', '-')}"


def dtype_of(options: argparse.Namespace) -> torch.dtype | None:
    """The dtype of --dtype; None without it."""
    return None if options.dtype is None else DTYPES[options.dtype]


def loaded(options: argparse.Namespace) -> Any:
    """The model with its weights. Raises ArgumentError for a device that this machine does not have."""
    if options.device is not None:
        try:
            # Torch raises one of these for a missing device, and `item` for `meta`.
            torch.ones((), device=options.device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ArgumentError(
                f"--device: expected a device of this machine, such as cpu, got {options.device}: {reason}"
            ) from error
    return load_model(options.model, dtype_of(options), options.device)


def sampling(options: argparse.Namespace, recommended: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """The options of `add_sampling` for `generate`: the given value, else the recommended one, else the default.

    `others` are further options of `generate`, which are checked with them. Raises ArgumentError, with the option as on
    the command line, for invalid values.
    """
    given = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    chosen = {**DEFAULTS, **recommended, **given, **others}
    try:
        GenerationOptions(**chosen)
    except ArgumentError as error:
        text = str(error)
        for name in chosen:
            text = re.sub(rf"\b{name}\b", flag(name), text)
        raise ArgumentError(text) from error
    return chosen


def stops(options: argparse.Namespace, model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """The options of `generate` that end an answer: the model's and the tokenizer's tokens, and the texts of --stop.

    Raises ArgumentError for an empty text.
    """
    texts = options.stop or []
    if not all(texts):
        raise ArgumentError("--stop: expected a text of at least one character, got an empty one")
    ends = {"stop_tokens": (*model.config.stop_tokens, *tokenizer.stop_tokens), "stop_strings": texts}
    return ends | ({"tokenizer": tokenizer} if texts else {})


def random_generator(options: argparse.Namespace, model: nn.Module) -> torch.Generator:
    """The random generator with --seed, on the device of the model."""
    device = next(model.parameters()).device
    try:
        return torch.Generator(device).manual_seed(options.seed)
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(f"--seed: expected a whole number of at most 64 bits, got {options.seed}") from error


def size_line(model: nn.Module) -> str:
    """The class, size and dtype of a model."""
    parameters = list(model.parameters())
    count, size = sum(each.numel() for each in parameters), sum(each.nbytes for each in parameters)
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    return f"{type(model).__name__}: {count:,} parameters, {size:,} bytes in {dtype}"
