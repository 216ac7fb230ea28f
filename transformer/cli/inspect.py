"""`python -m transformer inspect`: what a model is made of and what its caches take, without its weights."""

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..attention import Attention
from ..cache import cache_bytes
from ..checkpoints import empty_model
from ..models import CachedModel
from .options import add_model, dtype_of

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

LENGTHS = [1024, 4096, 16384, 65536]

_NUMBER = re.compile(r"\.\d+\.")


def add_to(commands: "Commands") -> None:
    """Adds the command."""
    about = "Print what a model is made of, and the bytes of its caches at some lengths. Only config.json is read."
    parser = commands.add_parser("inspect", help="parameters, heads, windows, bytes of caches", description=about)
    add_model(parser)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help=f"tokens (default: {LENGTHS})"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints parameters, a table of the attention modules, and one of the caches."""
    model = empty_model(options.model, dtype_of(options))
    print("\n".join(described(model, options.lengths, options.batch)))


def described(model: nn.Module, lengths: Sequence[int], batch: int) -> Iterator[str]:
    """The lines about a model, which may be on `meta`; what writes nothing has no caches."""
    parameters = list(model.parameters())
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    count, size = sum(each.numel() for each in parameters), sum(each.nbytes for each in parameters)
    yield f"{type(model).__name__}: {count:,} parameters, {size:,} bytes in {dtype}"
    yield ""
    yield from _table(["attention", "layers", "heads", "groups", "head dim", "window"], _attentions(model))
    if isinstance(model, CachedModel):
        yield ""
        yield from _table(["tokens", "cache bytes"], _caches(model, lengths, batch))


def _attentions(model: nn.Module) -> Iterator[list[str]]:
    """A row for the layers of a stack that are alike."""
    alike: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            window = "all" if module.window_size is None else f"{module.window_size:,}"
            sinks = f" + {module.num_sinks}" if module.num_sinks else ""
            counts = (f"{number:,}" for number in (module.num_heads, module.num_groups, module.head_dim))
            alike[_NUMBER.sub(".*.", name), (*counts, window + sinks)] += 1
    for (name, numbers), layers in alike.items():
        yield [name, str(layers), *numbers]


def _caches(model: CachedModel, lengths: Sequence[int], batch: int) -> Iterator[list[str]]:
    """The most that caches take after so many tokens, over a source that is as long, where one is read."""
    model.enable_cache()
    for length in lengths:
        yield [f"{length:,}", f"{cache_bytes(model, batch, length, source_length=length):,}"]


def _table(names: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    """Columns as wide as what stands in them: the first to the left, numbers to the right."""
    cells = [names, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *right])
