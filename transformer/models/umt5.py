"""UMT5 (arXiv 2304.09151) with the interface of T5: encoder, decoder, an explicit cache, generate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from ..attention import Attention, real_tokens
from ..cache import CacheCall, CacheSlot, LayerCache, holders, readers, run_call
from ..errors import ArgumentError, ShapeError, shown
from ..generation import Generated, GenerationKeywords, generation_options, run_generate, stream
from ..signatures import typed_as
from .config import EncoderDecoderConfig
from .encoder_decoder import EncoderDecoderTransformer
from .generate_signatures import umt5_generate
from .outputs import ModelOutput, requested_outputs
from .signatures import umt5_call
from .source_reader import Source, SourceReader, Target, begin_targets
from .t5 import UMT5Config
from .tied import TiedModel
from .tokens import check_vectors, checked_ids


@dataclass(frozen=True, slots=True)
class UMT5Cache:
    """Caches of the decoder for one batch of targets and their sources.

    Each is a read-only mapping with `'key'` and `'value'`, one per layer: of the target tokens so far
    [B, H, position, D], and, after the first call, of the source [B, H, S, D].
    """

    self_attention: tuple[LayerCache, ...]
    cross_attention: tuple[LayerCache, ...]
    batch_size: int
    encoder_length: int

    @property
    def position(self) -> int:
        """Number of tokens of the longest target so far: the position of the next one."""
        return self.self_attention[0].length


def init_cache(
    config: UMT5Config | EncoderDecoderConfig,
    batch_size: int,
    max_decoder_length: int,
    encoder_length: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> UMT5Cache:
    """An empty cache for `UMT5Model.decoder`, with room for `max_decoder_length` tokens of each target.

    The first call fills in the source's keys and values, and so does each call with another source. Raises
    ArgumentError for numbers below 1.
    """
    numbers = {"batch_size": batch_size, "max_decoder_length": max_decoder_length, "encoder_length": encoder_length}
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ArgumentError(f"{name}: expected a whole number of at least 1, got {shown(value)}")
    chosen = config.encoder_decoder() if isinstance(config, UMT5Config) else config
    layers = range(chosen.decoder_layers)
    heads, head_dim = chosen.num_heads, chosen.head_dim or chosen.d_model // chosen.num_heads
    own = [LayerCache(heads, head_dim, max_length=max_decoder_length) for _ in layers]
    for cache in own:
        cache.allocate(batch_size, max_decoder_length, dtype, device)
    return UMT5Cache(tuple(own), tuple(LayerCache(heads, head_dim) for _ in layers), batch_size, encoder_length)


class UMT5Model(TiedModel):
    """UMT5: an `EncoderDecoderTransformer` whose encoder, decoder and head can also be called separately.

    Raises ConfigurationError, naming the option, for what cannot work.
    """

    def __init__(self, config: UMT5Config | EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config.encoder_decoder() if isinstance(config, UMT5Config) else config
        self.transformer = EncoderDecoderTransformer.from_config(self.config)

    @classmethod
    def from_config(cls, config: UMT5Config | EncoderDecoderConfig) -> "UMT5Model":
        """A new model of that configuration."""
        return cls(config)

    @typed_as(umt5_call)
    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Tensor | ModelOutput:
        """Logits [B, L, V] of the token after each of `decoder_input_ids` [B, L], over `input_ids` int64 [B, S].

        The other arguments are those of `EncoderDecoderTransformer`: without `decoder_input_ids` targets are the
        `labels` after the start token.
        """
        requested = requested_outputs(output_attentions, output_hidden_states)
        source = self._source(input_ids, attention_mask)
        target = None
        if decoder_input_ids is not None or labels is None:
            target = self._target(decoder_input_ids, decoder_attention_mask)
        masks, rest = (attention_mask, decoder_attention_mask), {"logits_to_keep": logits_to_keep, **requested}
        result: Tensor | ModelOutput = self.transformer(source, target, *masks, labels=labels, **rest)
        return result

    def encoder(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Output of the encoder [B, S, E] for sources int64 [B, S]. `attention_mask` [B, S]: true for real tokens."""
        return self.transformer.encode(self._source(input_ids, attention_mask), attention_mask)

    def decoder(
        self,
        decoder_input_ids: Tensor,
        encoder_states: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        cache: UMT5Cache | None = None,
        use_cache: bool = False,
    ) -> Tensor:
        """Input of the head, [B, L, E], from target tokens int64 [B, L] and `encoder_states` [B, S, E].

        With `use_cache=True` give a `cache` of `init_cache`, and only the tokens that are not in it yet; the call
        appends them. A call that raises does not change the cache.

        Raises ArgumentError where one of the two is missing, in `train()` mode, and for ids outside of the vocabulary;
        ShapeError for another batch or source than the cache is for; CacheFullError past its length.
        """
        ids = self._target(decoder_input_ids, decoder_attention_mask)
        check_vectors("encoder_states", encoder_states, self.config.d_model)
        batch, length = encoder_states.shape[:2]
        real_tokens("attention_mask", attention_mask, batch, length, encoder_states.device)
        if cache is None or not use_cache:
            if use_cache or cache is not None:
                raise ArgumentError(
                    f"cache, use_cache: expected a cache of init_cache and use_cache=True, or neither, "
                    f"got {type(cache).__name__} and {use_cache}"
                )
            return self.transformer.decode(ids, encoder_states, attention_mask, decoder_attention_mask)
        if self.training:
            raise ArgumentError("use_cache: expected eval() mode, got train(); call model.eval() first")
        expected = cache.batch_size, cache.encoder_length, self.config.d_model
        if encoder_states.shape != expected:
            raise ShapeError(
                f"encoder_states: expected {list(expected)}, as the cache is for, got {list(encoder_states.shape)}"
            )
        slots = {}
        blocks = self.transformer.decoder_blocks()
        for block, own, source in zip(blocks, cache.self_attention, cache.cross_attention, strict=True):
            reading = set(readers(block))
            for holder in holders(block).values():
                kept = source if holder in reading else own
                if isinstance(holder, Attention) and holder.num_groups != kept.num_kv_heads:
                    raise ShapeError(
                        f"cache: expected {holder.num_groups} heads in each layer, got {kept.num_kv_heads}; where "
                        "ranks share the model give init_cache the number of heads of one: replace(config, num_heads="
                        f"{holder.num_heads}, head_dim={holder.head_dim})"
                    )
                slots[holder] = CacheSlot(kept)
        decode = self.transformer.decode
        return run_call(CacheCall(slots), decode, ids, encoder_states, attention_mask, decoder_attention_mask)

    def lm_head(self, states: Tensor) -> Tensor:
        """Output of `decoder`, [B, L, E], to logits [B, L, V]."""
        logits: Tensor = self.transformer.head(states)
        return logits

    @typed_as(umt5_generate)
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        return_scores: bool = False,
        **options: Unpack[GenerationKeywords],
    ) -> Tensor | Generated:
        """The new tokens of each target, without the start token: int64 [B * num_return_sequences, N].

        As `EncoderDecoderTransformer.generate`, with `decoder_input_ids` as its `target_ids`.
        """
        options = self.transformer.config.generating(options)
        begun = self._begin((input_ids, attention_mask), (decoder_input_ids, decoder_attention_mask), options)
        return run_generate(*begun, options, before=decoder_input_ids, return_scores=return_scores)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> Iterator[Tensor]:
        """The new tokens as they come, int64 [B * num_return_sequences] each."""
        options = self.transformer.config.generating(options)
        generation_options(options).check_streams()
        begun = self._begin((input_ids, attention_mask), (decoder_input_ids, decoder_attention_mask), options)
        return stream(*begun, **options)

    def _source(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return checked_ids("input_ids", ids, self.config.tgt_vocab_size, "attention_mask", mask)

    def _begin(
        self,
        source: tuple[Tensor, Tensor | None],
        target: tuple[Tensor | None, Tensor | None],
        options: GenerationKeywords,
    ) -> tuple[SourceReader, Tensor, Tensor | None]:
        vocabulary = self.config.tgt_vocab_size
        begins = Source(*source, vocabulary, ("input_ids", "attention_mask"))
        continues = Target(*target, vocabulary, ("decoder_input_ids", "decoder_attention_mask"))
        return begin_targets(self.transformer, begins, continues, self.transformer.config.start_token, options)

    def _target(self, ids: Any, mask: Tensor | None) -> Tensor:
        return checked_ids("decoder_input_ids", ids, self.config.tgt_vocab_size, "decoder_attention_mask", mask)

    def tie_weights(self) -> None:
        """As of `EncoderDecoderTransformer`."""
        self.transformer.tie_weights()

    def resize_token_embeddings(self, vocab_size: int) -> Self:
        """Changes the number of tokens, of source and target, as of `EncoderDecoderTransformer`."""
        self.transformer.resize_token_embeddings(vocab_size)
        self.config = self.transformer.config
        return self

    def reset_parameters(self) -> None:
        """As of `EncoderDecoderTransformer`."""
        self.transformer.reset_parameters()

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
