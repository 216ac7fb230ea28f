"""The blocks of a model one above the other, each kind's step worked out once per forward."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attention import Attention, plan_steps
from ..cache import Guard, Step, transaction
from ..errors import ArgumentError, ConfigurationError
from .branches import check_source
from .decoder import DecoderBlock
from .encoder import EncoderBlock

Block = EncoderBlock | DecoderBlock


class BlockStack(nn.Module):
    """Encoder or decoder blocks, run in order, and a last norm where one is given.

    Layers may differ: windows and full attention, kinds of attention, widths of heads. What layers of one kind share in
    a call (positions, masks, rotary angles) is worked out once.

    Args:
        blocks: at least one block, all of one `embed_dim`; those with cross-attention read the same source.
        norm: a module for the outputs of the last block; a stack with norms before its branches needs one.

    Raises ConfigurationError for blocks that cannot stand above each other.
    """

    def __init__(self, blocks: Iterable[Block], norm: nn.Module | None = None) -> None:
        super().__init__()
        blocks = list(blocks)
        _check_blocks(blocks)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self._guard = Guard()

    @classmethod
    def from_pattern(
        cls, pattern: str, num_layers: int, norm: nn.Module | None = None, **kinds: Callable[[], Block]
    ) -> "BlockStack":
        """A stack of `num_layers` blocks whose kinds are named, in order and over again, by `pattern`.

        `from_pattern("sliding sliding full", 6, norm, sliding=..., full=...)`: each keyword is a name in the pattern,
        and makes a new block of that kind. Raises ConfigurationError for an empty pattern, a name without a maker, a
        maker without a layer, or `num_layers` below 1.
        """
        names = layer_kinds(pattern, num_layers)
        if set(names) != set(kinds):
            raise ConfigurationError(
                f"pattern: expected the kinds {sorted(kinds)}, each in at least one of {num_layers} layers, "
                f"got {pattern!r}"
            )
        return cls([kinds[name]() for name in names], norm)

    def plan(
        self, x: Tensor, expanding_context: bool | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Step, ...]:
        """The steps of a call with `x` [B, L, E], one per layer, as `plan_steps` gives them.

        Of use where something before the stack needs positions too: `forward` makes its own where it is given none.
        """
        return plan_steps(self._attentions(), x, expanding_context, attention_mask)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        expanding_context: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        steps: tuple[Step, ...] | None = None,
    ) -> Tensor:
        """`x` [B, L, E] through all blocks to [B, L, E], over `source` [B, S, kv_dim] where they have cross-attention.

        Args:
            x, expanding_context, attention_mask: as in the attention's own forward.
            source, source_mask: its `kv` and `kv_mask`.
            steps: this call's facts, from `plan`; then no mask and no mode are given.

        Raises:
            ArgumentError, ShapeError, DtypeError, DeviceError, CacheFullError, CacheStateError, ConcurrentUseError.

        Whatever is raised, be it in the last layer: every cache is then as it was before the call.
        """
        readers = [_cross_attention(block) for block in self.blocks]
        check_source(source, source_mask, next(filter(None, readers), None))
        attentions = self._attentions()
        owners = [attention for attention in (*attentions, *filter(None, readers)) if attention.use_kv_cache]
        arguments = x, attentions, readers, source, expanding_context, attention_mask, source_mask, steps
        if not owners or all(owner.compiles for owner in owners):
            # A compiled step writes what it changes at its end, and so all of it or nothing.
            return self._run(*arguments)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
            eagerly: Callable[..., Tensor] = torch.compiler.disable(self._all_or_nothing)  # type: ignore[no-untyped-call]
            return eagerly(owners, *arguments)
        return self._all_or_nothing(owners, *arguments)

    def _attentions(self) -> list[Attention]:
        return cast("list[Attention]", [block.attention for block in self.blocks])

    def _all_or_nothing(self, owners: list[Attention], *arguments: Any) -> Tensor:
        with self._guard, transaction(owners):
            return self._run(*arguments)

    def _run(
        self,
        x: Tensor,
        attentions: list[Attention],
        readers: list[Attention | None],
        source: Tensor | None,
        expanding_context: bool | None,
        attention_mask: Tensor | None,
        source_mask: Tensor | None,
        steps: tuple[Step, ...] | None,
    ) -> Tensor:
        if steps is None:
            steps = plan_steps(attentions, x, expanding_context, attention_mask)
        elif expanding_context is not None or attention_mask is not None:
            raise ArgumentError(
                "steps: expected no expanding_context and no attention_mask beside them; they carry both"
            )
        if len(steps) != len(attentions):
            raise ArgumentError(f"steps: expected one for each of {len(attentions)} layers, got {len(steps)}")
        for block, reader, step in zip(self.blocks, readers, steps, strict=True):
            read = {} if reader is None else {"source": source, "source_mask": source_mask}
            x = block(x, step=step, **read)
        if self.norm is not None:
            x = self.norm(x)
        return x


def layer_kinds(pattern: str, num_layers: int) -> tuple[str, ...]:
    """The kind of each of `num_layers` layers: the words of `pattern`, over and over.

    Raises ConfigurationError for a pattern without a word or with more words than layers.
    """
    words = pattern.split() if type(pattern) is str else []
    if not words or type(num_layers) is not int or len(words) > num_layers:
        raise ConfigurationError(
            f"pattern: expected at least one word and no more than num_layers={num_layers}, got {pattern!r}"
        )
    return tuple(words[layer % len(words)] for layer in range(num_layers))


def _cross_attention(block: nn.Module) -> Attention | None:
    return block.cross_attention if isinstance(block, DecoderBlock) else None


def _check_blocks(blocks: list[Block]) -> None:
    if not blocks:
        raise ConfigurationError("blocks: expected at least one block, got none")
    for index, block in enumerate(blocks):
        if not isinstance(block, Block):
            raise ConfigurationError(
                f"blocks: expected EncoderBlock or DecoderBlock, got {type(block).__name__} as block {index}; "
                "run other modules in a loop of your own, with the steps that plan_steps gives"
            )
        width, first = block.attention.embed_dim, blocks[0].attention.embed_dim
        if width != first:
            raise ConfigurationError(f"blocks: expected embed_dim={first}, as block 0, got {width} in block {index}")
