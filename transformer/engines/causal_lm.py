"""A decoder-only composition with its language head, as a model of transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..errors import ConfigurationError
from ..models.tokens import last_states
from .attention_masks import Masks, masks_of
from .config import ModularConfig
from .modeling import CACHE, ModularModel, ModularPreTrainedModel


class ModularForCausalLM(ModularPreTrainedModel, GenerationMixin):
    """A composition of this library as a model of transformers, with its language head.

    `as_pretrained` makes one that shares the weights of a `DecoderOnlyTransformer`; `from_pretrained` loads one.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (as in the base)
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: ModularConfig) -> None:
        super().__init__(config)
        self.model = ModularModel(config)
        options = self.model.built_of.config
        self.vocab_size = options.vocab_size
        self.lm_head = nn.Linear(options.d_model, options.vocab_size, bias=options.head_bias)
        self.logit_scale, self.logit_softcap = options.logit_scale, options.logit_softcap
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, V], and the loss where `labels` int64 [B, L] are given; see `ModularModel.forward`.

        `logits_to_keep`: how many of the last tokens get logits, 0 for all, or their indices.
        """
        read = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        states = read.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            states = states[:, logits_to_keep]
        else:
            states = last_states(states, logits_to_keep)
        if self.logit_scale != 1.0:
            states = states * self.logit_scale
        logits = self.lm_head(states)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=read.hidden_states,
            attentions=read.attentions,
            **{CACHE: getattr(read, CACHE)},
        )

    def create_masks_for_generate(
        self,
        config: ModularConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        **_unused: Any,
    ) -> Masks:
        """Masks that `generate` makes before a compiled step: one for each distinct window, not for each kind."""
        given = past_key_values if cache is None else cache
        return masks_of(config, self.model.windows, inputs_embeds, attention_mask, given, position_ids)

    def init_continuous_batching(self, *arguments: Any, **keywords: Any) -> Any:
        """The manager of continuous batching, as `generate_batch` and servers make it.

        Raises ConfigurationError for layers with several windows or different key/value heads, which its cache does not
        hold, and for a soft cap of attention scores, which it ignores.
        """
        attentions = [layer.self_attn for layer in self.model.layers]
        windows = {each.sliding_window for each in attentions} - {None}
        heads = {(each.k_proj.out_features // each.head_dim, each.head_dim) for each in attentions}
        if len(windows) > 1 or len(heads) > 1 or self.config.has_softcap:
            raise ConfigurationError(
                "generate_batch: expected one window size, one number and size of key/value heads in all layers, and "
                f"no soft cap of attention scores, got windows {sorted(windows)}, key/value heads {sorted(heads)} and "
                f"{'a' if self.config.has_softcap else 'no'} soft cap; use generate()"
            )
        return super().init_continuous_batching(*arguments, **keywords)
