"""Blocks of a stateless step: which of them can run without their own caches, and one block over given buffers."""

from functools import partial

from torch import Tensor, nn

from ..attention import Attention
from ..attention.conversion.convert import KINDS
from ..attention.stateless_step import Slots, stateless_cross_step, stateless_step
from ..blocks import BlockStack, DecoderBlock, EncoderBlock
from ..blocks.residual import in_parallel
from ..cache import Step
from ..errors import ConfigurationError
from ..plain import is_hooked


def check_blocks(stack: BlockStack, *, reads_source: bool) -> None:
    """Raises ConfigurationError, naming the module, unless each block is one of this library whose parts can be called.

    A hook or another forward of the stack, of a block or of an attention module would not run.
    """
    check_unhooked("decoder", stack)
    for index, block in enumerate(stack.blocks):
        path = f"decoder.blocks.{index}"
        if type(block) not in (DecoderBlock, EncoderBlock):
            raise ConfigurationError(
                f"{path}: expected a DecoderBlock or an EncoderBlock of this library, got {type(block).__name__}, "
                "whose attention would use a cache of its own; take wrappers off, or compose it of our blocks"
            )
        reader = reader_of(block)
        if (reader is not None) is not reads_source:
            wanted, got = ("a module, as the model has sources", "None") if reads_source else ("None", "a module")
            raise ConfigurationError(f"{path}.cross_attention: expected {wanted}, got {got}; compose the block anew")
        check_unhooked(path, block)
        _check_attention(f"{path}.attention", block.attention)
        if reader is not None:
            _check_attention(f"{path}.cross_attention", reader)
        if not block.attention.apply_causal_mask:
            raise ConfigurationError(
                f"{path}.attention: expected apply_causal_mask=True to decode token by token, got False"
            )


def reader_of(block: nn.Module) -> Attention | None:
    """The cross-attention module of a block; None where it has none."""
    return block.cross_attention if isinstance(block, DecoderBlock) else None


def readers_of(stack: BlockStack) -> list[Attention]:
    """The cross-attention module of each layer, in a model that has them."""
    return list(filter(None, map(reader_of, stack.blocks)))


def run_block(
    block: DecoderBlock | EncoderBlock, x: Tensor, step: Step, slots: Slots, source: Slots | None, real: Tensor | None
) -> tuple[Tensor, Slots]:
    """`x` [B, L, E] through one block to [B, L, E], after the tokens in `slots`, and the slots after it.

    `source`: projected keys and values of the source, of which `real` bool [B, S] are tokens.
    """
    written: list[Slots] = []

    def attend(x: Tensor) -> Tensor:
        out, after = stateless_step(block.attention, x, step, slots)
        written.append(after)
        return out

    # A partial, as in the block's own forward.
    feed_forward = partial(block.feed_forward)
    second = block.feed_forward_residual
    if second is None or (isinstance(block, DecoderBlock) and block.residual == "parallel"):
        return in_parallel(x, attend, feed_forward, block.attention_residual, second), written[0]
    x = block.attention_residual(x, attend)
    reader = reader_of(block)
    if isinstance(block, DecoderBlock) and reader is not None and source is not None and real is not None:
        x = block.cross_attention_residual(x, partial(stateless_cross_step, reader, source=source, real=real))
    out: Tensor = second(x, feed_forward)
    return out, written[0]


def _check_attention(path: str, module: nn.Module) -> None:
    if type(module) not in KINDS:
        raise ConfigurationError(
            f"{path}: expected an attention module of this library, got {type(module).__name__}; take wrappers off"
        )
    check_unhooked(path, module)


def check_unhooked(path: str, module: nn.Module) -> None:
    """Raises ConfigurationError for a module with hooks or a forward of its own, which a step does not run."""
    if is_hooked(module):
        raise ConfigurationError(
            f"{path}: expected a module without hooks and with the forward of its class, got others, which a step "
            "without state would leave out; remove them first"
        )
