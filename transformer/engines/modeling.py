"""Decoder-only compositions as models of transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..errors import ArgumentError, ConfigurationError
from ..models import ModelConfig
from ..models.layers import position_maker
from ..models.tokens import in_each_dtype
from ..positions import Rotation, SinusoidalPositions
from .attention import ModularAttention
from .attention_masks import Masks, mask_word, masks_of, positions_of
from .config import ModularConfig
from .layers import NORMS, ModularDecoderLayer, norm_of

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in this release of transformers: 5.24 renamed it. Both are accepted."""


class ModularPreTrainedModel(PreTrainedModel):
    """Base of both models: what transformers asks of a class of models."""

    config_class = ModularConfig
    config: ModularConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ModularDecoderLayer"]  # noqa: RUF012 (an instance variable in the base class)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ModularDecoderLayer, "attentions": ModularAttention}  # noqa: RUF012

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        if self.config.has_softcap:
            raise ConfigurationError(
                'attn_implementation: expected "eager" (the default) or "flex_attention" for a soft cap of attention '
                'scores, got "sdpa", which has none'
            )
        return bool(super()._sdpa_can_dispatch(is_init_check))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding) and module is not self.base_model.embed_positions:
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, (nn.Embedding, nn.Linear, *NORMS)):
            module.reset_parameters()


class ModularModel(ModularPreTrainedModel):
    """Embedding, decoder layers and last norm of a composition, without its head."""

    def __init__(self, config: ModularConfig) -> None:
        super().__init__(config)
        whole = config.composition().expanded()
        self.built_of = whole
        options, layers = whole.config, whole.layers
        scale = options.embedding_scale
        self.embed_tokens = nn.Embedding(options.vocab_size, options.d_model)
        self.embedding_scales = None if scale == 1.0 else in_each_dtype(scale)
        learned = options.max_length if options.position == "learned" else None
        self.position_offset = options.position_offset
        self.embed_positions = (
            None if learned is None else nn.Embedding(learned + options.position_offset, options.d_model)
        )
        self.sinusoids = None
        if options.position == "sinusoidal":
            self.sinusoids = SinusoidalPositions(options.d_model, interleaved=options.sinusoidal_interleaved)
        self.embed_norm = norm_of(options, options.d_model) if options.embedding_norm else None
        self.dropout = options.dropout
        rotations = [_rotation(layer.options) for layer in layers]
        # Equal ones are one object, whose table is computed once in a forward.
        self.rotations = {repr(each): each for each in rotations if each is not None}
        self.rotation_names = [None if each is None else repr(each) for each in rotations]
        self.layers = nn.ModuleList(
            ModularDecoderLayer(config, layer, index, None if name is None else self.rotations[name])
            for index, (layer, name) in enumerate(zip(layers, self.rotation_names, strict=True))
        )
        windows = [layer.options.window_size for layer in layers]
        self.mask_words = [mask_word(window, config.sliding_window) for window in windows]
        self.windows = dict(zip(self.mask_words, windows, strict=True))
        self.norm = None if whole.last_norm is None else norm_of(whole.last_norm, options.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """States [B, L, E] after the last norm, of `input_ids` int64 [B, L] or of `inputs_embeds` [B, L, E].

        Args:
            attention_mask: [B, S], true for a real token, over the cached tokens and these; or masks [B, 1, L, S].
            position_ids: int64 [1 or B, L]; by default real tokens are counted.
            past_key_values, cache: a cache of transformers; two names of one argument.
            use_cache: whether to make one where none is given.

        Raises ArgumentError unless exactly one of `input_ids` and `inputs_embeds` is given, and for tokens or positions
        that have no embedding; ShapeError for an `attention_mask` of other rows or too few columns.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError("input_ids, inputs_embeds: expected exactly one of the two, got both or none")
        past_key_values, kwargs = _cache_of(past_key_values, cache, kwargs)
        if inputs_embeds is None:
            inputs_embeds = _looked_up("input_ids", self.embed_tokens, input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        masks = masks_of(self.config, self.windows, inputs_embeds, attention_mask, past_key_values, position_ids)
        if position_ids is None:
            position_ids = positions_of(attention_mask, inputs_embeds, past_key_values)
        hidden_states = self._input(inputs_embeds, position_ids)
        tables = {name: each.table(position_ids, hidden_states) for name, each in self.rotations.items()}
        for layer, word, rotation in zip(self.layers, self.mask_words, self.rotation_names, strict=True):
            hidden_states = layer(
                hidden_states,
                position_embeddings=None if rotation is None else tables[rotation],
                attention_mask=masks[word],
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        outputs: dict[str, Any] = {CACHE: past_key_values}
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **outputs)

    def _input(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Input of the first layer: scaled embeddings, with absolute positions, a norm and dropout."""
        x = embeddings
        if self.embedding_scales is not None:
            x = x * self.embedding_scales[x.dtype]
        if self.embed_positions is not None:
            x = x + _looked_up("position_ids", self.embed_positions, position_ids, self.position_offset)
        if self.sinusoids is not None:
            x = self.sinusoids.add_at(x, position_ids)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


def _looked_up(name: str, table: nn.Module, numbers: Any, offset: int = 0) -> Tensor:
    """Rows of a table, counted after its first `offset`.

    Raises ArgumentError for numbers that it has no rows for, where the device says so.
    """
    at = numbers + offset if offset else numbers
    if torch.compiler.is_compiling():
        rows: Tensor = table(at)
        return rows
    try:
        rows = table(at)
    except IndexError as error:
        count, least, most = len(table.get_parameter("weight")) - offset, int(numbers.min()), int(numbers.max())
        raise ArgumentError(f"{name}: expected numbers from 0 to {count - 1}, got {least} to {most}") from error
    return rows


def _rotation(options: ModelConfig) -> Rotation | None:
    position = position_maker(options)()
    return position if isinstance(position, Rotation) else None


def _cache_of(given: Cache | None, cache: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The cache that the layers update, and the arguments for the attention function.

    Before 5.24 continuous batching gives its paged cache to the attention function, which updates it.
    """
    if cache is None:
        return given, kwargs
    if CACHE != "cache" and not isinstance(cache, Cache):
        return given, {**kwargs, "cache": cache}
    return cache, kwargs
