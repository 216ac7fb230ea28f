"""A model that continues text: an embedding, decoder blocks, and a head."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks import DecoderBlock
from ..generation import Reader, Session, UseCache, generate, stream
from .cached import CachedModel, decoder_blocks_of
from .config import DecoderOnlyConfig
from .layers import absolute_positions, decoder_stack, language_head
from .tokens import InputPositions, TokenEmbedding, checked_ids


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

    def __init__(
        self, vocab_size: int, d_model: int, num_heads: int, d_ff: int, num_layers: int, **options: Any
    ) -> None:
        super().__init__()
        config = self.config = DecoderOnlyConfig(vocab_size, d_model, num_heads, d_ff, num_layers, **options)
        self.embedding = TokenEmbedding(vocab_size, d_model, config.embedding_scale)
        self.positions = InputPositions(absolute_positions(config), config.dropout)
        self.decoder = decoder_stack(config, num_layers)
        self.head = language_head(config, vocab_size, self.embedding)

    @classmethod
    def from_config(cls, config: DecoderOnlyConfig) -> "DecoderOnlyTransformer":
        """A new model of that configuration."""
        return cls(**config.to_dict())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, expanding_context: bool | None = None
    ) -> Tensor:
        """Logits [B, L, V] of the token after each of `input_ids` int64 [B, L].

        Args:
            input_ids: with caches on, the tokens that the model has not read yet.
            attention_mask: [B, L], true for a real token; padding on either side.
            expanding_context: as in the attention's own forward, for all layers.

        Raises ArgumentError for ids outside the vocabulary, and what the attention's forward raises; every cache is
        then as it was.
        """
        ids = checked_ids("input_ids", input_ids, self.config.vocab_size, attention_mask)
        logits: Tensor = self.head(self.states(ids, attention_mask, expanding_context))
        return logits

    def states(self, ids: Tensor, mask: Tensor | None = None, expanding_context: bool | None = None) -> Tensor:
        """What the head reads: [B, L, E] of ids that are known to be in the vocabulary."""
        x = self.embedding(ids)
        steps = self.decoder.plan(x, expanding_context, mask)
        out: Tensor = self.decoder(self.positions(x, steps[0]), steps=steps)
        return out

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """The prompt and the new tokens after it: int64 [B * num_return_sequences, L + N].

        `options` are those of `GenerationOptions`: `max_new_tokens=`, `temperature=`, `num_beams=`, .... Stop and pad
        tokens are the configuration's where none are given. While caches are on the conversation goes on: give the new
        turn's tokens alone. Raises as `generation.generate` does; the model must be in `eval()` mode.
        """
        options = self.config.generating(options)
        new = generate(self._reader(input_ids, attention_mask), input_ids, attention_mask, **options)
        copies = new.shape[0] // input_ids.shape[0]
        return torch.cat((input_ids.repeat_interleave(copies, 0), new), 1)

    def stream(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        """The new tokens as they come, int64 [B * num_return_sequences] each; see `generation.stream`."""
        options = self.config.generating(options)
        return stream(self._reader(input_ids, attention_mask), input_ids, attention_mask, **options)

    def decoder_blocks(self) -> Sequence[DecoderBlock]:
        """Its blocks, in order."""
        return decoder_blocks_of(self.decoder)

    def _reader(self, input_ids: Tensor, attention_mask: Tensor | None) -> Reader:
        checked_ids("input_ids", input_ids, self.config.vocab_size, attention_mask)
        return _PromptReader(self)


class _PromptReader(Reader):
    """Reads with the model, and forms logits of the last column alone."""

    def __init__(self, model: DecoderOnlyTransformer) -> None:
        self.model = model

    def read(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.model.head.last(self.model.states(tokens, attention_mask))

    def select(self, rows: Sequence[int]) -> None:
        """The prompt is in the caches, or in the tokens themselves."""

    def session(self, use_cache: UseCache, most_new_tokens: int) -> Session:
        return self.model.session(use_cache, most_new_tokens)
