"""Stages of a model for `torch.distributed.pipelining`: runs of consecutive blocks, one stage per rank.

A batch is split into microbatches, and a stage works on one while the next stage works on the one before (GPipe, arXiv
1811.06965).
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..attention import Attention
from ..blocks import BlockStack
from ..blocks.block_list import BlockList
from ..blocks.layers import layers_of
from ..errors import ArgumentError, CacheStateError, ConfigurationError, shown
from ..initialization import reset_children, reset_module
from ..models import DecoderOnlyTransformer
from ..models.tied import TiedModel
from ..models.tokens import checked_ids, logits_of
from ..signatures import typed_as


def pipeline_stages(model: nn.Module, number: int) -> list[nn.Module]:
    """The `number` stages of `model`, in order, each for a `torch.distributed.pipelining.PipelineStage`.

    A stage has consecutive blocks; the numbers of blocks differ by at most one, and the last stages have fewer. The
    stages share the modules of `model` under the names that these have there, so a checkpoint of the stages is one of
    the model, and loads into any number of stages. To allocate one stage only, build the model on the meta device and
    call `to_empty` on the stage.

    - A stage of a `BlockStack` is a `BlockStack`. The last one has the norm.
    - A stage of a `DecoderOnlyTransformer` is a `DecoderStage`. The first one takes token ids, and has the embedding
      and the positions; the last one has the norm and the head, and gives logits.

    Each rank gives masks and modes to its own stage: `schedule.step(ids, attention_mask=mask)` on the first one,
    `schedule.step(attention_mask=mask)` on the others.

    Raises ArgumentError for another model, or a `number` below 1 or above the number of blocks; ConfigurationError for
    cross-attention, and for a parameter that two stages would share, such as a tied head; CacheStateError where caches
    are on.
    """
    stack = model.decoder if isinstance(model, DecoderOnlyTransformer) else model
    if not isinstance(stack, BlockStack):
        raise ArgumentError(
            "model: expected a BlockStack or a DecoderOnlyTransformer without a wrapper, got "
            f"{type(model).__name__}; cut the stack of another model, and wrap stages afterwards"
        )
    blocks = list(stack.blocks)
    if type(number) is not int or not 1 <= number <= len(blocks):
        raise ArgumentError(
            f"number: expected from 1 to {len(blocks)} stages, as the model has so many blocks, got {shown(number)}"
        )
    if any(layer.reads_source for layer in layers_of(blocks)):
        raise ConfigurationError(
            "model: expected blocks without cross-attention, got some that read a source, which is not sent from stage "
            "to stage"
        )
    if _has_caches_on(model):
        raise CacheStateError("model: expected caches to be off, got them on; disable_cache() or use_kv_cache=False")
    size, larger = divmod(len(blocks), number)
    ends = [size * stage + min(stage, larger) for stage in range(number + 1)]
    parts = [_part_of(stack, begin, end) for begin, end in pairwise(ends)]
    stages: list[nn.Module] = [*parts]
    if isinstance(model, DecoderOnlyTransformer):
        stages = [DecoderStage(model, part, first=part is parts[0], last=part is parts[-1]) for part in parts]
    _check_no_parameter_is_shared(stages)
    return stages


class DecoderStage(TiedModel):
    """Consecutive blocks of a `DecoderOnlyTransformer`, with its embedding in the first stage, its head in the last.

    Made by `pipeline_stages`.
    """

    def __init__(self, model: DecoderOnlyTransformer, decoder: BlockStack, *, first: bool, last: bool) -> None:
        super().__init__()
        self.embedding = model.embedding if first else None
        self.positions = model.positions if first else None
        self.decoder = decoder
        self.head = model.head if last else None
        self._vocab_size = model.config.vocab_size

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, expanding_context: bool | None = None) -> Tensor:
        """Output of the stage, [B, L, E], or logits [B, L, V] of a last stage with a head.

        Args:
            x: the output of the stage before, [B, L, E]; ids int64 [B, L] in the first stage.
            attention_mask, expanding_context: as in the model's forward, the same in all stages.

        Raises what the model's forward raises, and CacheStateError where caches are on: each microbatch is a sequence
        of its own.
        """
        if _has_caches_on(self):
            raise CacheStateError("attention: expected use_kv_cache=False in a pipeline, got True; disable_cache()")
        if self.embedding is not None:
            x = self.embedding(checked_ids("x", x, self._vocab_size, "attention_mask", attention_mask))
        steps = self.decoder.plan(x, expanding_context, attention_mask)
        if self.positions is not None:
            x = self.positions(x, steps[0])
        x = self.decoder(x, steps=steps)
        return x if self.head is None else logits_of(self.head, x, 0, steps[0].run)

    def reset_parameters(self) -> None:
        """Initialises all parameters of the stage; for use after `to_empty()`."""
        reset_children(self)
        if self.embedding is not None:
            # Last, as in the model: a tied head of a single stage has initialised the table otherwise.
            reset_module(self.embedding)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


def _part_of(stack: BlockStack, begin: int, end: int) -> BlockStack:
    """The blocks from `begin` to before `end`, under their names in `stack`, and its norm after the last of them."""
    blocks = BlockList()
    for place in range(begin, end):
        blocks.add_module(str(place), stack.blocks[place])
    part = BlockStack(blocks, stack.norm if end == len(stack.blocks) else None)
    part.blocks = blocks
    return part


def _has_caches_on(model: nn.Module) -> bool:
    enabled = isinstance(model, DecoderOnlyTransformer) and model.kv_cache is not None
    return enabled or any(isinstance(module, Attention) and module.use_kv_cache for module in model.modules())


def _check_no_parameter_is_shared(stages: list[nn.Module]) -> None:
    """Raises ConfigurationError for a parameter in two stages: each would train a copy with a part of the gradient."""
    names: dict[int, tuple[int, str]] = {}
    for stage, module in enumerate(stages):
        for name, parameter in module.named_parameters():
            other, first_name = names.setdefault(id(parameter), (stage, name))
            if other != stage:
                raise ConfigurationError(
                    f"model: expected no parameter in two stages, got {first_name} of stage {other} again as {name} of "
                    f"stage {stage}; build the model with tied_embeddings=False, and where positions are relative with "
                    "relative_per_layer=True"
                )
