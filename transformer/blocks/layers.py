"""Layers of a stack: the attention modules inside each block, the checks of blocks, their steps, patterns of kinds."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from ..attention import Attention
from ..cache import ReadsSource, Step
from ..errors import ArgumentError, ConfigurationError, shown
from ..positions import ScoreBias
from .branches import accepts
from .decoder import DecoderBlock
from .encoder import EncoderBlock


class Layer(NamedTuple):
    """A block of a stack, and the attention modules inside it, also those inside wrappers."""

    block: nn.Module
    attention: Attention | None
    """The self-attention module, which plans the step."""
    readers: tuple[Attention, ...]
    """The attention modules that read a source."""
    reads_source: bool | None
    """True if the block reads a source; None for a block of another class, which may accept one."""


def layers_of(blocks: Iterable[nn.Module]) -> list[Layer]:
    """The layers that these blocks make."""
    layers = []
    for block in blocks:
        layer = None
        if type(block) in (DecoderBlock, EncoderBlock):
            # Fast path of the usual case; reading the registry costs a fifth of the attribute access.
            attention, reader = block._modules["attention"], block._modules.get("cross_attention")
            if isinstance(attention, Attention) and reader is None:
                layer = Layer(block, attention, (), False)
            elif isinstance(attention, Attention) and isinstance(reader, Attention):
                layer = Layer(block, attention, (reader,), True)
        layers.append(_searched(block) if layer is None else layer)
    return layers


def _searched(block: nn.Module) -> Layer:
    """The layer of a block that may be a wrapper, or of another class."""
    modules = list(block.modules())
    reading = [module for module in modules if isinstance(module, ReadsSource)]
    readers = tuple(reader for module in reading for reader in module.readers() if isinstance(reader, Attention))
    found = [module for module in modules if isinstance(module, Attention)]
    own = [attention for attention in found if not any(attention is reader for reader in readers)]
    return Layer(block, own[0] if own else None, readers, bool(readers) if reading else None)


def layer_kinds(pattern: str, num_layers: int) -> tuple[str, ...]:
    """The kind of each of `num_layers` layers: the words of `pattern`, repeated.

    Raises ConfigurationError for a pattern without words or with more words than layers.
    """
    words = pattern.split() if type(pattern) is str else []
    if not words or type(num_layers) is not int or len(words) > num_layers:
        raise ConfigurationError(
            f"pattern: expected at least one word and no more than num_layers={num_layers}, got {shown(pattern)}"
        )
    return tuple(words[layer % len(words)] for layer in range(num_layers))


def shortest_pattern(kinds: Sequence[str]) -> str:
    """The fewest words that give these kinds, of at least one layer, when they are repeated: `layer_kinds` undone."""
    lengths = range(1, len(kinds) + 1)
    return next(" ".join(kinds[:n]) for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


def check_blocks(blocks: list[nn.Module]) -> None:
    """Raises ConfigurationError for no blocks, other modules than blocks, and blocks of different widths."""
    if not blocks:
        raise ConfigurationError("blocks: expected at least one block, got none")
    width = None
    for index, block in enumerate(blocks):
        if not _is_block(block):
            raise ConfigurationError(
                f"blocks: expected modules with a DecoderBlock's forward, got {type(block).__name__} as block {index}"
            )
        attention = layers_of([block])[0].attention
        if attention is None:
            continue
        width = attention.embed_dim if width is None else width
        if attention.embed_dim != width:
            raise ConfigurationError(
                f"blocks: expected embed_dim={width}, as the blocks before, got {attention.embed_dim} in block {index}"
            )
    if width is None:
        raise ConfigurationError("blocks: expected an attention module of this library in one of them, got none")


def check_blocks_plan(layers: Sequence[Layer]) -> None:
    """Raises ArgumentError for a block without attention of this library where tokens have a layout, of which it would
    not know."""
    for index, layer in enumerate(layers):
        if layer.attention is None:
            raise ArgumentError(
                "segment_ids, prefix_lengths, position_ids: expected None in a stack with a block without attention of "
                f"this library, got {type(layer.block).__name__} as block {index}"
            )


def steps_of_one_call(steps: tuple[Step, ...], layers: Sequence[Layer]) -> tuple[Step, ...]:
    """Copies of the steps for one call, if a layer has a learned bias; layers that share a step share its copy."""
    for layer in layers:
        position = None if layer.attention is None else layer.attention.position
        if isinstance(position, ScoreBias) and position.learned:
            break
    else:
        return steps
    renewed: dict[int, Step] = {}
    for step in steps:
        if id(step) not in renewed:
            renewed[id(step)] = step.for_one_call()
    return tuple(renewed[id(step)] for step in steps)


def _is_block(block: object) -> bool:
    """True for a module whose forward takes a `step`, except for attention, which has no residual connection."""
    return isinstance(block, nn.Module) and not isinstance(block, Attention) and accepts(block, "step")
