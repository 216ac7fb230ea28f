"""Encoder-decoder model: an encoder of sources, and a decoder of targets with cross-attention."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks import StackOutput
from ..cache import FlatRun
from ..errors import ArgumentError
from ..signatures import configured_by, typed_as
from ..tracing import run_eagerly
from .config import EncoderDecoderConfig
from .inputs import check_one, check_reads_whole, checked_vectors
from .layers import decoder_stack, encoder_stack, input_positions, language_head
from .loss import checked_labels, loss_and_logits, real_labels, shifted_right
from .outputs import ModelOutput, requested_outputs, stack_output
from .signatures import encoder_decoder_call
from .target_generation import TargetModel
from .tokens import TokenEmbedding, check_logits_to_keep, checked_ids, logits_of
from .wrappers import check_unused


class EncoderDecoderTransformer(TargetModel):
    """Encoder-decoder transformer: sources and target tokens to the logits of the next target tokens (Attention Is
    All You Need, arXiv 1706.03762).

    Args:
        src_vocab_size: size of the source vocabulary; None where sources are vectors [B, S, d_model].
        tgt_vocab_size: `V`, size of the target vocabulary.
        d_model, num_heads, d_ff, num_layers: `E`, `H`, the inner width of the feed-forward networks, and the number of
            blocks of the encoder, and of the decoder unless `num_decoder_layers` is given.
        options: those of `EncoderDecoderConfig` and `LayerOptions`.

    Raises ConfigurationError, naming the option, for what cannot work.
    """

    @configured_by(EncoderDecoderConfig)
    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.target_embedding = TokenEmbedding(config.tgt_vocab_size, config.d_model, config.embedding_scale)
        self.source_embedding = None
        if config.shared_embeddings:
            self.source_embedding = self.target_embedding
        elif config.src_vocab_size is not None:
            self.source_embedding = TokenEmbedding(config.src_vocab_size, config.d_model, config.embedding_scale)
        self.source_positions = input_positions(config)
        self.target_positions = input_positions(config)
        self.encoder = encoder_stack(config)
        self.decoder = decoder_stack(config, reads_source=True)
        self.head = language_head(config, config.tgt_vocab_size, self.target_embedding)

    @classmethod
    def from_config(cls, config: EncoderDecoderConfig) -> "EncoderDecoderTransformer":
        """A new model of that configuration."""
        return cls(**config.to_dict())

    @typed_as(encoder_decoder_call)
    def forward(
        self,
        source_ids: Tensor | None = None,
        target_ids: Tensor | None = None,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **unused: None,
    ) -> Tensor | ModelOutput:
        """Logits [B, L, V] of the token after each of `target_ids` int64 [B, L], over `source_ids` int64 [B, S].

        Args:
            source_ids: ids, or vectors [B, S, E] where the model has no source vocabulary; or
            inputs_embeds: [B, S, E], vectors as `source_embedding` gives them; or
            encoder_hidden_states: [B, S, E], the output of the encoder. Give exactly one of the three.
            target_ids: with caches on, only the target tokens that are not in them yet. None: the `labels` after the
                start token, or, without labels, no targets: the result is the output of the encoder [B, S, E].
            source_mask: [B, S], true for a real source token.
            target_mask: [B, L], true for a real target token.
            labels: int64 [B, L], the ids that are to be predicted, each by the target id of its column. -100 does not
                count, nor does padding. The result is a `ModelOutput` with the mean cross-entropy as `loss`.
            logits_to_keep: how many of the last tokens get logits, [B, n, V]; 0: all. With `labels` and another number
                than 0 the loss is computed over chunks of tokens, so that its memory does not grow with B, L and V.
            output_attentions, output_hidden_states: whether to return a `ModelOutput`, with the attention weights of
                each layer (before dropout), or with the embeddings and the output of each layer.
            unused: names that transformers' models take and this one does not: None each.

        Raises ArgumentError for ids or labels outside their vocabulary, and what the attention's forward raises; every
        cache is then as it was.
        """
        check_unused(unused)
        check_logits_to_keep(logits_to_keep)
        requested = requested_outputs(output_attentions, output_hidden_states)
        check_one(source_ids=source_ids, inputs_embeds=inputs_embeds, encoder_hidden_states=encoder_hidden_states)
        for name, vectors in (("inputs_embeds", inputs_embeds), ("encoder_hidden_states", encoder_hidden_states)):
            if vectors is not None:
                checked_vectors(name, vectors, self.config.d_model, "source_mask", source_mask)
        if logits_to_keep or (labels is not None and target_ids is None):
            check_reads_whole("labels without target_ids, logits_to_keep", self.decoder)
        ids = None
        if labels is not None:
            labels = checked_labels(labels, self.config.tgt_vocab_size)
            if target_ids is None:
                target_ids = shifted_right(labels, self.config.start_token, self.config.pad_token)
        if target_ids is not None:
            ids = checked_ids("target_ids", target_ids, self.config.tgt_vocab_size, "target_mask", target_mask)
            labels = None if labels is None else real_labels(labels, ids, "target_mask", target_mask)
        elif target_mask is not None:
            raise ArgumentError("target_mask: expected None without target_ids, got a tensor")
        if encoder_hidden_states is None:
            x = self._embedded_source(source_ids, source_mask) if inputs_embeds is None else inputs_embeds
            source = self._read_source(x, source_mask, requested)
        elif ids is None:
            raise ArgumentError("target_ids: expected int64 [B, L] beside encoder_hidden_states, got None")
        else:
            source = stack_output(encoder_hidden_states)
        if ids is None:
            return ModelOutput(None, source.states, None, None, None, *source[:3]) if requested else source.states
        return self.in_one_call(
            self.decoder, self._result, ids, source, source_mask, target_mask, logits_to_keep, requested, labels
        )

    def _result(
        self,
        ids: Tensor,
        source: StackOutput,
        source_mask: Tensor | None,
        target_mask: Tensor | None,
        logits_to_keep: int,
        requested: dict[str, Any],
        labels: Tensor | None,
    ) -> Tensor | ModelOutput:
        read, run = self._read_target(ids, source.states, source_mask, target_mask, requested)
        if labels is not None:
            loss, logits = loss_and_logits(self.head, read.states, labels, logits_to_keep, run)
            return ModelOutput(logits, *read, *source[:3], loss=loss)
        logits = logits_of(self.head, read.states, logits_to_keep, run)
        return ModelOutput(logits, *read, *source[:3]) if requested else logits

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Output of the encoder: [B, S, E]."""
        return self._read_source(self._embedded_source(source_ids, source_mask), source_mask, {}).states

    def _embedded_source(self, source_ids: Any, source_mask: Tensor | None) -> Tensor:
        if self.source_embedding is None:
            return checked_vectors("source_ids", source_ids, self.config.d_model, "source_mask", source_mask)
        ids = checked_ids("source_ids", source_ids, self.config.src_vocab_size or 0, "source_mask", source_mask)
        return self.source_embedding(ids)

    def _read_source(self, x: Tensor, source_mask: Tensor | None, requested: dict[str, Any]) -> StackOutput:
        steps = self.encoder.plan(x, None, source_mask)
        return stack_output(self.encoder(self.source_positions(x, steps[0]), steps=steps, **requested))

    def decode(
        self,
        ids: Tensor,
        encoder_hidden_states: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Input of the head, [B, L, E], from target ids, which are not checked, and states [B, S, E] of the encoder."""
        return self._read_target(ids, encoder_hidden_states, source_mask, target_mask, {})[0].states

    def _read_target(
        self,
        ids: Tensor,
        encoder_hidden_states: Tensor,
        source_mask: Tensor | None,
        target_mask: Tensor | None,
        requested: dict[str, Any],
    ) -> tuple[StackOutput, FlatRun | None]:
        """The stack's output, and where the real tokens are."""
        arguments = self.target_embedding(ids), encoder_hidden_states, source_mask, target_mask, requested
        if torch.compiler.is_dynamo_compiling() and self.decoder.keeps_cache():
            return run_eagerly(self._run_decoder, *arguments)
        return self._run_decoder(*arguments)

    def _run_decoder(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor,
        source_mask: Tensor | None,
        target_mask: Tensor | None,
        requested: dict[str, Any],
    ) -> tuple[StackOutput, FlatRun | None]:
        steps = self.decoder.plan(x, None, target_mask)
        x = self.target_positions(x, steps[0])
        out = self.decoder(x, encoder_hidden_states, source_mask=source_mask, steps=steps, **requested)
        return stack_output(out), steps[0].run

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a target, by the positions; None: no limit."""
        return self.target_positions.positions_limit

    def decoder_blocks(self) -> Sequence[nn.Module]:
        """The decoder's blocks, in order."""
        return list(self.decoder.blocks)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
