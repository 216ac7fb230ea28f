"""Decoder-only model: an embedding, decoder blocks and a language head."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..blocks import BlockStack, StackOutput
from ..cache import FlatRun
from ..errors import ConfigurationError
from ..positions import AbsolutePositions
from ..signatures import configured_by, typed_as
from ..tracing import run_eagerly
from .by_parts import composed_config, tied_path, token_table
from .config import DecoderOnlyConfig
from .inputs import TokensSaid, check_one, check_reads_whole, checked_vectors, layout_of, named_mask
from .layers import decoder_stack, input_positions, language_head
from .loss import checked_labels, loss_and_logits, next_labels
from .outputs import ModelOutput, requested_outputs, stack_output
from .signatures import decoder_only_call
from .text_generation import TextModel
from .tokens import (
    InputPositions,
    LanguageHead,
    TokenEmbedding,
    check_has_head,
    check_logits_to_keep,
    checked_ids,
    last_states,
    logits_of,
)
from .wrappers import check_unused


class DecoderOnlyTransformer(TextModel):
    """Decoder-only transformer: token ids to the logits of the next tokens, over the whole context or a window of it.

    `forward` serves training (caches off, logits of all positions at once) and inference. `generate` and `stream`
    produce text; while caches are on they continue the sequence in them.

    Args:
        vocab_size, d_model, num_heads, d_ff, num_layers: `V`, `E`, `H`, the inner width of the feed-forward networks,
            and the number of blocks.
        options: those of `DecoderOnlyConfig` and `LayerOptions`, such as `attention="gqa", num_kv_heads=2` or
            `window_size=1024`.

    `from_parts` makes a model of modules instead of options.

    Raises ConfigurationError, naming the option, for what cannot work.
    """

    # Typed as in a model by options, whose attributes typed programs read. By parts they are the given parts, and
    # `config` is a ComposedConfig.
    config: DecoderOnlyConfig
    embedding: TokenEmbedding
    head: LanguageHead | None

    @configured_by(DecoderOnlyConfig)
    def __init__(self, config: DecoderOnlyConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding = TokenEmbedding(config.vocab_size, config.d_model, config.embedding_scale)
        self.positions = input_positions(config)
        self.decoder = decoder_stack(config)
        self.head = language_head(config, config.vocab_size, embedding) if config.has_head else None

    @classmethod
    def from_config(cls, config: DecoderOnlyConfig) -> "DecoderOnlyTransformer":
        """A new model of that configuration.

        Raises ConfigurationError for the configuration of a model by parts, which does not describe its layers.
        """
        if not isinstance(config, DecoderOnlyConfig):
            raise ConfigurationError(
                f"config: expected a DecoderOnlyConfig, got {type(config).__name__}; a new model of the parts of an "
                "existing one is composed(composition_of(model))"
            )
        return cls(**config.to_dict())

    @classmethod
    def from_parts(
        cls,
        embedding: nn.Module,
        stack: BlockStack,
        head: nn.Module | None,
        positions: AbsolutePositions | InputPositions | None = None,
    ) -> "DecoderOnlyTransformer":
        """A model of modules that the caller composed; they become its submodules, and nothing is copied.

        Args:
            embedding: from ids [B, L] to [B, L, E]: `TokenEmbedding`, `nn.Embedding`, or a module with exactly one
                `nn.Embedding`, which has a row for each token of the vocabulary.
            stack: blocks without cross-attention, in causal order; also wrapped ones, and blocks of one's own.
            head: from [B, L, E] to logits [B, L, V]: `LanguageHead`, `nn.Linear`, or another module. Its weight may be
                the embedding's table, and stays it. None: the model gives states and generates nothing.
            positions: `LearnedPositions` or `SinusoidalPositions`, added to the embeddings, or `InputPositions`.

        The model's `config` is a `ComposedConfig`. Raises ConfigurationError, naming the argument, for parts that do
        not fit each other.
        """
        config = composed_config(embedding, stack, head, positions)
        model = cls.__new__(cls)
        TextModel.__init__(model)
        model.config = cast("DecoderOnlyConfig", config)
        model.embedding = cast("TokenEmbedding", embedding)
        model.positions = positions if isinstance(positions, InputPositions) else InputPositions(positions, 0.0)
        model.decoder = stack
        model.head = cast("LanguageHead | None", head)
        if head is not None and not isinstance(head, LanguageHead):
            model._tied_path = tied_path(head, token_table(embedding)) or ""
        model._follow_mode()  # Caches are off in a new model.
        return model

    @typed_as(decoder_only_call)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        expanding_context: bool | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **unused: None,
    ) -> Tensor | ModelOutput:
        """Logits [B, L, V] of the token after each of `input_ids` int64 [B, L]; states [B, L, E] without a head.

        Args:
            input_ids: with caches on, only the tokens that are not in them yet.
            attention_mask: [B, L], true for a real token; padding on either side.
            expanding_context: as in the attention's own forward, for all layers.
            inputs_embeds: [B, L, E], vectors as `embedding` gives them, in place of `input_ids`; give exactly one.
            segment_ids: int [B, L] in place of a mask: each run of equal numbers is a document, which sees no other and
                begins at position 0; 0 is padding. Caches must be off.
            prefix_lengths: int [B], how many first tokens of a row see each other in both directions (prefix LM); the
                rest is causal. With caches in the call that begins the rows.
            position_ids: int [B, L], positions in place of the counted ones. Order and windows stay those of the row.
            labels: int64 [B, L], the ids that are to be predicted, most often `input_ids` themselves: each by the token
                before it. -100 does not count, nor do padding, the first token of a row or document, and a prefix. The
                result is a `ModelOutput` with the mean cross-entropy as `loss`.
            logits_to_keep: how many of the last tokens get logits, [B, n, V]; 0: all. With `labels` and another number
                than 0 the loss is computed over chunks of tokens, so that its memory does not grow with B, L and V.
            output_attentions, output_hidden_states: whether to return a `ModelOutput`, with the attention weights of
                each layer (before dropout), or with the embeddings and the output of each layer.
            unused: names that transformers' models take and this one does not: None each.

        Raises ArgumentError for ids or labels outside the vocabulary, and what the attention's forward raises; every
        cache is then as it was.
        """
        check_unused(unused)
        check_logits_to_keep(logits_to_keep)
        requested = requested_outputs(output_attentions, output_hidden_states)
        check_one(input_ids=input_ids, inputs_embeds=inputs_embeds)
        if labels is not None or logits_to_keep:
            check_reads_whole("labels, logits_to_keep", self.decoder)
        layout, mask = None, ("attention_mask", attention_mask)
        if segment_ids is not None or prefix_lengths is not None or position_ids is not None:
            layout = layout_of(segment_ids, prefix_lengths, position_ids)
            mask = named_mask(layout, attention_mask)
        if input_ids is not None:
            x = self.embedding(checked_ids("input_ids", input_ids, self.config.vocab_size, *mask))
        else:
            x = checked_vectors("inputs_embeds", inputs_embeds, self.config.d_model, *mask)
        said = TokensSaid(expanding_context, attention_mask, layout)
        if labels is not None:
            check_has_head("labels", self.head)
            labels = next_labels(checked_labels(labels, self.config.vocab_size), x, attention_mask, layout)
        return self.in_one_call(self.decoder, self._result, x, said, logits_to_keep, requested, labels)

    def _result(
        self,
        x: Tensor,
        said: TokensSaid,
        logits_to_keep: int,
        requested: dict[str, Any],
        labels: Tensor | None,
    ) -> Tensor | ModelOutput:
        read, run = self._read(x, said, requested)
        if labels is not None and self.head is not None:
            loss, kept = loss_and_logits(self.head, read.states, labels, logits_to_keep, run)
            return ModelOutput(kept, *read[:3], loss=loss)
        logits = None if self.head is None else logits_of(self.head, read.states, logits_to_keep, run)
        if requested:
            return ModelOutput(logits, *read[:3])
        return last_states(read.states, logits_to_keep) if logits is None else logits

    def states(self, ids: Tensor, mask: Tensor | None = None, expanding_context: bool | None = None) -> Tensor:
        """Input of the head, [B, L, E]; the ids are not checked."""
        return self._read(self.embedding(ids), TokensSaid(expanding_context, mask), {})[0].states

    def _read(self, x: Tensor, said: TokensSaid, requested: dict[str, Any]) -> tuple[StackOutput, FlatRun | None]:
        """The stack's output, and where the real tokens are."""
        if torch.compiler.is_dynamo_compiling() and self.decoder.keeps_cache():
            return run_eagerly(self._run_stack, x, said, requested)
        return self._run_stack(x, said, requested)

    def _run_stack(self, x: Tensor, said: TokensSaid, requested: dict[str, Any]) -> tuple[StackOutput, FlatRun | None]:
        steps = self.decoder.plan(x, *said)
        return stack_output(self.decoder(self.positions(x, steps[0]), steps=steps, **requested)), steps[0].run

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a row, by the positions; None: no limit."""
        return self.positions.positions_limit

    def decoder_blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order."""
        return list(self.decoder.blocks)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
