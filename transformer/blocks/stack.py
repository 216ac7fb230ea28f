"""Stack of blocks, with one step per kind of layer in each forward."""

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import Attention, plan_steps, plan_without_cache
from ..cache import CacheCall, Step, TokenLayout, active_call, run_call
from ..errors import ArgumentError, ConfigurationError
from ..initialization import reset_children
from ..signatures import typed_as
from ..tracing import run_eagerly
from .block_list import BlockList
from .branches import check_reads_whole_rows, check_source
from .flat_stream import FlatStream
from .layers import Layer, check_blocks, check_blocks_plan, layer_kinds, layers_of, steps_of_one_call
from .outputs import StackOutput, block_with_weights
from .shared_stream import SharedStream
from .signatures import stack_call


class StackCall(NamedTuple):
    """The arguments of one call of a stack."""

    x: Tensor
    source: Tensor | None
    expanding_context: bool | None
    attention_mask: Tensor | None
    source_mask: Tensor | None
    steps: tuple[Step, ...] | None
    output_attentions: bool
    output_hidden_states: bool


class BlockStack(nn.Module):
    """Encoder or decoder blocks that run in order, with an optional last norm.

    Layers may differ: windows and full attention, kinds of attention, widths of heads. The facts that layers of one
    kind share in a call (positions, masks, rotary angles) are computed once. A block may be any module with the
    `forward` of a `DecoderBlock`: one of this library, a wrapped one (checkpoint_wrapper, torch.compile, FSDP), or one
    of your own. The stack finds the attention modules inside. The first one that reads no source plans the block's
    step. With `return_weights=True`, which only a call with `output_attentions` gives, a block of your own returns
    `(states, weights)` or `(states, weights, cross_weights)`.

    Args:
        blocks: at least one block, all with the same `embed_dim`; blocks with cross-attention read the same source.
        norm: a module for the output of the last block; a stack with norms before its branches needs one.

    Raises ConfigurationError for blocks that do not fit each other.
    """

    def __init__(self, blocks: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        blocks = list(blocks)
        check_blocks(blocks)
        self.blocks = BlockList(blocks)
        self.norm = norm

    @classmethod
    def from_pattern(
        cls, pattern: str, num_layers: int, norm: nn.Module | None = None, **kinds: Callable[[], nn.Module]
    ) -> "BlockStack":
        """A stack of `num_layers` blocks, whose kinds follow the words of `pattern`, repeated.

        `from_pattern("sliding sliding full", 6, norm, sliding=..., full=...)`: each keyword is a word of the pattern,
        and its value makes a new block of that kind. Raises ConfigurationError for an empty pattern, a word without a
        keyword, a keyword without a layer, or `num_layers` below 1.
        """
        names = layer_kinds(pattern, num_layers)
        if set(names) != set(kinds):
            raise ConfigurationError(
                f"pattern: expected the kinds {sorted(kinds)}, each in at least one of {num_layers} layers, "
                f"got {pattern!r}"
            )
        return cls([kinds[name]() for name in names], norm)

    def plan(
        self,
        x: Tensor,
        expanding_context: bool | None = None,
        attention_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> tuple[Step, ...]:
        """The steps of a call with `x` [B, L, E], one per layer, as `plan_steps` gives them.

        Needed only for a `layout` of tokens (packed documents, prefixes, positions), or if code before the stack uses
        positions too: without steps, `forward` plans its own.
        """
        return self._plan(layers_of(self.blocks), x, expanding_context, attention_mask, layout)

    @typed_as(stack_call)
    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        expanding_context: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        steps: tuple[Step, ...] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Tensor | StackOutput:
        """`x` [B, L, E] through all blocks to [B, L, E]; blocks with cross-attention read `source` [B, S, kv_dim].

        Args:
            x, expanding_context, attention_mask: as in the attention's forward.
            source, source_mask: `kv` and `kv_mask` of the attention's forward.
            steps: the steps of this call, from `plan`; a mask or a mode cannot be given with them.
            output_attentions, output_hidden_states: whether to return a `StackOutput`, with the attention weights of
                each block, or with the input of the first block and the output of each block.

        Raises what the attention's forward raises, and ArgumentError for a source or steps that do not fit. If a layer
        raises, each cache is as it was before the call.
        """
        layers = layers_of(self.blocks)
        _check_source(source, source_mask, layers)
        given = x, source, expanding_context, attention_mask, source_mask, steps
        call = StackCall(*given, output_attentions, output_hidden_states)
        if not self._keeps_cache(layers):
            return self._run(layers, call)
        if torch.compiler.is_dynamo_compiling():
            return run_eagerly(self._run_cached, layers, call)
        return self._run_cached(layers, call)

    def keeps_cache(self) -> bool:
        """True if the next call uses caches, except for a compiled step with a frozen layout."""
        return self._keeps_cache(layers_of(self.blocks))

    def _keeps_cache(self, layers: list[Layer]) -> bool:
        caching: list[Attention] = []
        for layer in layers:
            attentions = layer.readers if layer.attention is None else (layer.attention, *layer.readers)
            # Dynamo of torch 2.11 does not follow `+=` with an iterator.
            caching.extend(filter(attrgetter("use_kv_cache"), attentions))
        if torch.compiler.is_compiling() and caching and all(attention.compiles for attention in caching):
            # A compiled step writes its changes at its end, so it needs no transaction.
            return False
        return bool(caching) or active_call() is not None

    def _plan(
        self,
        layers: list[Layer],
        x: Tensor,
        expanding_context: bool | None,
        attention_mask: Tensor | None,
        layout: TokenLayout | None = None,
    ) -> tuple[Step, ...]:
        attentions = [layer.attention for layer in layers if layer.attention is not None]
        if layout is not None:
            check_blocks_plan(layers)
        if not attentions:
            return (plan_without_cache(x, expanding_context, attention_mask),) * len(layers)
        planned = plan_steps(attentions, x, expanding_context, attention_mask, layout)
        if len(planned) == len(layers):
            return planned
        steps = iter(planned)
        return tuple(planned[0] if layer.attention is None else next(steps) for layer in layers)

    def _run_cached(self, layers: list[Layer], call: StackCall) -> Tensor | StackOutput:
        if active_call() is not None:
            return self._run(layers, call)
        return run_call(CacheCall(), self._run, layers, call)

    def _run(self, layers: list[Layer], call: StackCall) -> Tensor | StackOutput:
        x, source, steps = call.x, call.source, call.steps
        if steps is None:
            steps = self._plan(layers, x, call.expanding_context, call.attention_mask)
        elif call.expanding_context is not None or call.attention_mask is not None:
            raise ArgumentError(
                "steps: expected expanding_context=None and attention_mask=None with steps, which contain both; leave "
                "them out"
            )
        if len(steps) != len(layers):
            raise ArgumentError(f"steps: expected one for each of {len(layers)} layers, got {len(steps)}; use plan()")
        if steps[0].at is None:
            steps = steps_of_one_call(steps, layers)
        stream: FlatStream | SharedStream | None = None
        if steps[0].run is not None:
            stream = FlatStream.of(x, steps)
        elif steps[0].sequence is not None:
            stream = SharedStream(steps[0].sequence, steps)
        states: list[Tensor] = []
        weights: list[Tensor] = []
        cross_weights: list[Tensor] = []
        for number, (layer, step) in enumerate(zip(layers, steps, strict=True)):
            given: dict[str, Any] = {"step": step}
            if stream is not None:
                x = stream.given_to(layer.block, x)
                given = {"step": stream.step_for(step)}
            if layer.attention is None:
                # Without a known attention module there is no step to give: the block plans its own.
                given = {"expanding_context": step.expanding_context, "attention_mask": step.real}
            if source is not None and layer.reads_source is not False:
                check_reads_whole_rows(step)
                given |= {"source": source, "source_mask": call.source_mask}
            if call.output_hidden_states:
                states.append(x if stream is None else stream.rows(x))
            if not call.output_attentions:
                x = layer.block(x, **given)
                continue
            out = block_with_weights(number, layer.block, x, given)
            x = out.states
            weights.append(out.weights)
            if out.cross_weights is not None:
                cross_weights.append(out.cross_weights)
        if self.norm is not None:
            x = self.norm(x if stream is None else stream.given_to(self.norm, x))
        if stream is not None:
            x = stream.rows(x)
        if not call.output_attentions and not call.output_hidden_states:
            return x
        return StackOutput(
            x,
            (*states, x) if call.output_hidden_states else None,
            tuple(weights) if call.output_attentions else None,
            tuple(cross_weights) if call.output_attentions and source is not None else None,
        )

    def reset_parameters(self) -> None:
        """Initialises all blocks and the last norm."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


def _check_source(source: Tensor | None, source_mask: Tensor | None, layers: list[Layer]) -> None:
    """Raises ArgumentError if the source is not a tensor, is missing, or is given although no block reads it."""
    if not isinstance(source, Tensor | None):
        raise ArgumentError(f"source: expected None or a tensor [B, S, kv_dim], got {type(source).__name__}")
    check_source(source, source_mask, list(map(attrgetter("reads_source"), layers)))
