"""A model that continues text: an embedding, decoder blocks, and a head."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..blocks import StackOutput
from ..cache import run_eagerly
from ..errors import ArgumentError
from ..generation import GenerationKeywords, generate_whole, stream
from ..initialization import reset_children
from ..signatures import configured_by, typed_as
from .cached import CachedModel
from .config import DecoderOnlyConfig
from .layers import absolute_positions, decoder_stack, language_head
from .outputs import ModelOutput, requested_outputs, stack_output
from .signatures import decoder_only_call
from .tokens import InputPositions, TokenEmbedding, check_logits_to_keep, checked_ids, last_states
from .wrappers import check_unused


class DecoderOnlyTransformer(CachedModel):
    """Tokens to the logits of the tokens after them, over all that came before or over windows of it.

    The same forward serves training (caches off, every position's logits at once) and inference; `generate` and
    `stream` write text, and go on from what the model's caches hold where they are on.

    Args:
        vocab_size, d_model, num_heads, d_ff, num_layers: the model's shape: `V`, `E`, `H`, the feed-forward network's
            inner width, and how many blocks.
        options: those of `LayerOptions`, such as `attention="gqa", num_groups=2` or `window_size=1024`.

    Raises ConfigurationError, naming the option, for what cannot work.
    """

    @configured_by(DecoderOnlyConfig)
    def __init__(self, config: DecoderOnlyConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model, config.embedding_scale)
        self.positions = InputPositions(absolute_positions(config), config.dropout)
        self.decoder = decoder_stack(config)
        self.head = language_head(config, config.vocab_size, self.embedding) if config.has_head else None

    @classmethod
    def from_config(cls, config: DecoderOnlyConfig) -> "DecoderOnlyTransformer":
        """A new model of that configuration."""
        return cls(**config.to_dict())

    @typed_as(decoder_only_call)
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        expanding_context: bool | None = None,
        *,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **unused: None,
    ) -> Tensor | ModelOutput:
        """Logits [B, L, V] of the token after each of `input_ids` int64 [B, L]; states [B, L, E] without a head.

        Args:
            input_ids: with caches on, the tokens that the model has not read yet.
            attention_mask: [B, L], true for a real token; padding on either side.
            expanding_context: as in the attention's own forward, for all layers.
            logits_to_keep: how many of the last tokens get logits, [B, n, V]; 0: all.
            output_attentions, output_hidden_states: whether to return a `ModelOutput`, with the attention weights of
                each layer (before dropout), or with the embeddings and the output of each layer.
            unused: names that transformers' models take and this one does not, such as `labels`: None each.

        Raises ArgumentError for ids outside the vocabulary, and what the attention's forward raises; every cache is
        then as it was.
        """
        check_unused(unused)
        check_logits_to_keep(logits_to_keep)
        requested = requested_outputs(output_attentions, output_hidden_states)
        ids = checked_ids("input_ids", input_ids, self.config.vocab_size, "attention_mask", attention_mask)
        return self.in_one_call(
            self.decoder, self._result, ids, attention_mask, expanding_context, logits_to_keep, requested
        )

    def _result(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        expanding_context: bool | None,
        logits_to_keep: int,
        requested: dict[str, Any],
    ) -> Tensor | ModelOutput:
        read = self._read(ids, attention_mask, expanding_context, requested)
        states = last_states(read.states, logits_to_keep)
        logits: Tensor | None = None if self.head is None else self.head(states)
        if requested:
            return ModelOutput(logits, *read[:3])
        return states if logits is None else logits

    def states(self, ids: Tensor, mask: Tensor | None = None, expanding_context: bool | None = None) -> Tensor:
        """What the head reads: [B, L, E] of ids that are known to be in the vocabulary."""
        return self._read(ids, mask, expanding_context, {}).states

    def _read(
        self, ids: Tensor, mask: Tensor | None, expanding_context: bool | None, requested: dict[str, Any]
    ) -> StackOutput:
        arguments = self.embedding(ids), expanding_context, mask, requested
        if torch.compiler.is_dynamo_compiling() and self.decoder.keeps_cache():
            return run_eagerly(self._run_stack, *arguments)
        return self._run_stack(*arguments)

    def _run_stack(
        self, x: Tensor, expanding_context: bool | None, attention_mask: Tensor | None, requested: dict[str, Any]
    ) -> StackOutput:
        steps = self.decoder.plan(x, expanding_context, attention_mask)
        return stack_output(self.decoder(self.positions(x, steps[0]), steps=steps, **requested))

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Unpack[GenerationKeywords]
    ) -> Tensor:
        """The prompt and the new tokens after it: int64 [B * num_return_sequences, L + N].

        `options` are those of `GenerationOptions`: `max_new_tokens=`, `temperature=`, `num_beams=`, .... Stop and pad
        tokens are the configuration's where none are given. While caches are on the conversation goes on: give the new
        turn's tokens alone. Raises as `generation.generate` does, and ArgumentError where the model has no head; it
        must be in `eval()` mode.
        """
        self._check_head()
        return generate_whole(self, input_ids, attention_mask, **self.config.generating(options))

    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Unpack[GenerationKeywords]
    ) -> Iterator[Tensor]:
        """The new tokens as they come, int64 [B * num_return_sequences] each; see `generation.stream`."""
        self._check_head()
        return stream(self, input_ids, attention_mask, **self.config.generating(options))

    @property
    def max_positions(self) -> int | None:
        """The most tokens of a row that its positions tell apart; None: any number."""
        return self.positions.positions_limit

    def decoder_blocks(self) -> Sequence[nn.Module]:
        """Its blocks, in order."""
        return list(self.decoder.blocks)

    def check_prompt(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """Raises as `forward`, where ids of a prompt are not in the vocabulary."""
        checked_ids("input_ids", tokens, self.config.vocab_size, "attention_mask", attention_mask)

    def tie_weights(self) -> None:
        """Makes the head's weight and the embedding's table one parameter, where the configuration ties the two.

        `to_empty`, `to` and `load_state_dict` keep them tied; this is for whatever has replaced one of them by hand.
        """
        if self.head is not None and self.config.tied_embeddings:
            self.head.tie_weights(self.embedding)

    def reset_parameters(self) -> None:
        """Initialises all parameters anew, and ties them: after `to_empty()`, a model as newly built."""
        reset_children(self)
        self.tie_weights()
        # Last, as a head that shares the table has drawn it at another size.
        self.embedding.reset_parameters()

    def _check_head(self) -> None:
        if self.head is None:
            raise ArgumentError(
                "generate, stream: expected a model with a head, got one with has_head=False; its forward gives states"
            )

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
