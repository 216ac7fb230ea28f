"""Command `inspect`: parameters, attention modules and cache sizes of a model, without its weights."""

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..attention import Attention
from ..cache import LayerPlan, cache_bytes
from ..cache.spec import SLACK
from ..checkpoints import empty_model
from ..errors import ArgumentError
from ..models import CachedModel, ComposedConfig, DecoderOnlyConfig, EncoderConfig, EncoderDecoderConfig
from .options import add_model, dtype_of, size_line

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

Config = DecoderOnlyConfig | ComposedConfig | EncoderDecoderConfig | EncoderConfig

LENGTHS = [1024, 4096, 16384, 65536]

EXPLANATION = f"""
keys and values: rows x layers x 2 x groups x head dim x tokens x bytes; a window holds its tokens and its sinks
most allocated: full buffers double, up to twice the tokens, or {SLACK} tokens more if that is larger;
a window has 2 x window + sinks + {SLACK} slots, so that the last chunk can be truncated"""

_NUMBER = re.compile(r"\.\d+\.")


def add_to(commands: "Commands") -> None:
    """Adds the command."""
    about = "Print the parameters and attention modules of a model, and the bytes of its caches. No weights are read."
    parser = commands.add_parser("inspect", help="parameters, heads, windows, bytes of caches", description=about)
    add_model(parser)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help=f"tokens (default: {LENGTHS})"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the parameters, a table of the attention modules, and a table of the caches.

    Raises ArgumentError, with the option, for invalid numbers.
    """
    if min(options.lengths) < 0:
        raise ArgumentError(f"--lengths: expected whole numbers of at least 0, got {min(options.lengths)}")
    if options.batch < 1:
        raise ArgumentError(f"--batch: expected a whole number of at least 1, got {options.batch}")
    model = empty_model(options.model, dtype_of(options))
    print("\n".join(described(model, options.lengths, options.batch)))


def described(model: Any, lengths: Sequence[int], batch: int) -> Iterator[str]:
    """The lines about a model, which may be on `meta`; a model that does not generate has no caches."""
    yield size_line(model)
    yield f"{_vocabulary(model.config)}; {_context(model)}"
    yield ""
    yield from _table(["attention", "layers", "heads", "groups", "head dim", "window"], _attentions(model))
    if isinstance(model, CachedModel):
        yield ""
        yield from _table(["tokens", "keys and values", "most allocated"], _caches(model, lengths, batch))
        yield EXPLANATION


def _attentions(model: nn.Module) -> Iterator[list[str]]:
    """A row for each group of equal layers of a stack."""
    equal: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            window = "all" if module.window_size is None else f"{module.window_size:,}"
            sinks = f" + {module.num_sinks}" if module.num_sinks else ""
            counts = (f"{number:,}" for number in (module.num_heads, module.num_groups, module.head_dim))
            equal[_NUMBER.sub(".*.", name), (*counts, window + sinks)] += 1
    for (name, numbers), layers in equal.items():
        yield [name, str(layers), *numbers]


def _caches(model: Any, lengths: Sequence[int], batch: int) -> Iterator[list[str]]:
    """Bytes of the cached keys and values, and maximum bytes of the caches, for each length; a source is as long."""
    model.enable_cache()
    plans, itemsize = model.layer_plans(), next(model.parameters()).itemsize
    for length in lengths:
        most = cache_bytes(model, batch, length, source_length=length)
        numbers = sum(2 * plan.num_kv_heads * plan.head_dim * _cached_length(plan, length) for plan in plans)
        yield [f"{length:,}", f"{batch * numbers * itemsize:,}", f"{most:,}"]


def _cached_length(plan: LayerPlan, length: int) -> int:
    return length if plan.window_size is None else min(length, plan.window_size + plan.num_sinks)


def _vocabulary(config: Config) -> str:
    if isinstance(config, EncoderDecoderConfig):
        source = "vectors" if config.src_vocab_size is None else f"{config.src_vocab_size:,} tokens"
        return f"vocabulary: {source} of the source, {config.tgt_vocab_size:,} tokens of the target"
    return f"vocabulary: {config.vocab_size:,} tokens"


def _context(model: Any) -> str:
    most = model.max_positions if isinstance(model, CachedModel) else model.config.max_length
    if most is not None:
        return f"context: at most {most:,} tokens, the size of its position table"
    if model.config.context_length is not None:
        return f"context: trained at up to {model.config.context_length:,} tokens, more can be read"
    return "context: any number of tokens"


def _table(names: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    """The lines of a table: the first column left-aligned, the others right-aligned."""
    cells = [names, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *right])
