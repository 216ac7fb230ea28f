"""Vocabularies of models: which weights are tied, how they begin, and a change of the number of tokens."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import MAX_SIZE, ArgumentError, ConfigurationError, shown
from ..initialization import reset_children, reset_module
from .by_parts import token_table
from .cached import CachedModel
from .config import EncoderDecoderConfig
from .tied import places_of, tie
from .tokens import LanguageHead, TokenEmbedding, checked_ids


def check_vocab_size(name: str, size: int) -> None:
    """Raises ArgumentError unless this is a number of tokens."""
    if type(size) is not int or not 1 <= size <= MAX_SIZE:
        raise ArgumentError(f"{name}: expected a whole number from 1 to {MAX_SIZE:,}, got {shown(size)}")


def resize(model: nn.Module, modules: Mapping[str, tuple[nn.Module, int]]) -> None:
    """Gives the weights, and biases, of embeddings and linear layers of a model as many rows as said, by path.

    Rows that stay keep their values; a new one is the mean of all earlier rows of its tensor. Dtype, device and
    `requires_grad` stay, and what is tied. Raises ConfigurationError, with the path, before anything changes, for any
    other module and for weights that are not plain parameters.
    """
    renewed: dict[int, nn.Parameter] = {}
    for path, (module, size) in modules.items():
        weight = module._parameters.get("weight")
        if not isinstance(module, nn.Embedding | nn.Linear) or type(weight) is not nn.Parameter:
            raise ConfigurationError(
                f"{path}: expected an nn.Embedding or nn.Linear with a plain weight, got {type(module).__name__} with "
                f"{type(weight).__name__}; resize before a wrapper, quantisation or sharding replaces it"
            )
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and module.padding_idx >= size:
            raise ConfigurationError(f"{path}: expected padding_idx={module.padding_idx} to be one of {size} rows")
        for parameter in (weight, module._parameters.get("bias")):
            if parameter is not None:
                renewed[id(parameter)] = _resized(parameter, size)
    for number, everywhere in places_of(model).items():
        for module, kind, _ in everywhere if number in renewed else ():
            module._parameters[kind] = renewed[number]
    for module, size in modules.values():
        if isinstance(module, nn.Embedding):
            module.num_embeddings = size
        elif isinstance(module, nn.Linear):
            module.out_features = size


def _resized(parameter: nn.Parameter, size: int) -> nn.Parameter:
    # Ordinary tensors: a parameter that was made in inference mode could not be trained.
    with torch.inference_mode(False), torch.no_grad():
        new = max(size - parameter.shape[0], 0)
        mean = parameter.mean(0, keepdim=True).expand(new, *parameter.shape[1:])
        return nn.Parameter(torch.cat((parameter[:size], mean)), requires_grad=parameter.requires_grad)


class OneVocabularyModel(CachedModel):
    """A decoder-only model: an embedding and a head of one vocabulary, which may be tied."""

    config: Any
    embedding: nn.Module
    head: Any
    _tied_path = "proj"
    """Path in the head of the module whose weight is the embedding's table, in a model that ties the two."""

    def check_prompt(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """Raises as `forward`, where ids of a prompt are not in the vocabulary."""
        checked_ids("input_ids", tokens, self.config.vocab_size, "attention_mask", attention_mask)

    def tie_weights(self) -> None:
        """Makes the head's weight and the embedding's table one parameter, where the configuration ties the two.

        `to_empty`, `to` and `load_state_dict` keep them tied; call this after other code has replaced one of them.
        """
        if self.head is not None and self.config.tied_embeddings:
            tie(self.head.get_submodule(self._tied_path), token_table(self.embedding), self._head_path())

    def resize_token_embeddings(self, vocab_size: int) -> Self:
        """Changes the number of tokens, of the embedding and the head, and `config.vocab_size`.

        A new token begins with the mean of all earlier rows; with fewer tokens the last rows are dropped. Dtype, device
        and `requires_grad` stay, and so do caches. The parameters are new: make the optimizer afterwards.

        Raises ArgumentError for a number below 1, and ConfigurationError, with the path, for a module that is not an
        `nn.Embedding` or `nn.Linear` with a plain weight; nothing has changed then.
        """
        check_vocab_size("vocab_size", vocab_size)
        config = replace(self.config, vocab_size=vocab_size)
        modules: dict[str, nn.Module] = {"embedding": token_table(self.embedding)}
        if self.head is not None:
            modules[self._head_path()] = self.head.get_submodule(self._tied_path)
        resize(self, {path: (module, vocab_size) for path, module in modules.items()})
        self.config = config
        return self

    def reset_parameters(self) -> None:
        """Initialises all parameters again and ties them, as in a new model; for use after `to_empty()`."""
        reset_children(self)
        self.tie_weights()
        # Last, because a tied head has initialised the table with another standard deviation.
        reset_module(self.embedding)

    def _head_path(self) -> str:
        return ".".join(filter(None, ("head", self._tied_path)))


class TwoVocabulariesModel(CachedModel):
    """An encoder-decoder model: embeddings of sources and of targets, which may be one table, and the targets' head."""

    config: EncoderDecoderConfig
    source_embedding: TokenEmbedding | None
    target_embedding: TokenEmbedding
    head: LanguageHead

    def check_prompt(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """Raises as `forward`, where ids of a target are not in the vocabulary."""
        checked_ids("target_ids", tokens, self.config.tgt_vocab_size, "attention_mask", attention_mask)

    def tie_weights(self) -> None:
        """Ties what the configuration ties: the head's weight to the target embedding, and shared embeddings.

        `to_empty`, `to` and `load_state_dict` keep them tied; call this after other code has replaced one of them.
        """
        if self.config.shared_embeddings and self.source_embedding is not None:
            tie(self.source_embedding.tokens, self.target_embedding.tokens, "source_embedding.tokens")
        if self.config.tied_embeddings:
            self.head.tie_weights(self.target_embedding)

    def resize_token_embeddings(self, tgt_vocab_size: int, src_vocab_size: int | None = None) -> Self:
        """Changes the numbers of target tokens, and of source tokens, in embeddings, head and configuration.

        `src_vocab_size=None`: sources keep their vocabulary, or follow where source and target share it. A new token
        begins with the mean of all earlier rows; with fewer tokens the last rows are dropped. Dtype, device and
        `requires_grad` stay, and so do caches. The parameters are new: make the optimizer afterwards.

        Raises ArgumentError for a number below 1 and for sources without a vocabulary, and ConfigurationError for
        different numbers of shared embeddings, for a start token that would be dropped, and, with the path, for a
        module that is not an `nn.Embedding` or `nn.Linear` with a plain weight; nothing has changed then.
        """
        check_vocab_size("tgt_vocab_size", tgt_vocab_size)
        sizes = {"tgt_vocab_size": tgt_vocab_size}
        if src_vocab_size is not None:
            check_vocab_size("src_vocab_size", src_vocab_size)
            if self.source_embedding is None:
                raise ArgumentError("src_vocab_size: expected None, as sources of this model are vectors, got a number")
            sizes["src_vocab_size"] = src_vocab_size
        elif self.config.shared_embeddings:
            sizes["src_vocab_size"] = tgt_vocab_size
        config = replace(self.config, **cast("Any", sizes))
        modules: dict[str, tuple[nn.Module, int]] = {
            "target_embedding.tokens": (self.target_embedding.tokens, tgt_vocab_size),
            "head.proj": (self.head.proj, tgt_vocab_size),
        }
        if self.source_embedding is not None and "src_vocab_size" in sizes:
            modules["source_embedding.tokens"] = self.source_embedding.tokens, sizes["src_vocab_size"]
        resize(self, modules)
        self.config = config
        return self

    def reset_parameters(self) -> None:
        """Initialises all parameters again and ties them, as in a new model; for use after `to_empty()`."""
        reset_children(self)
        self.tie_weights()
        # Last, because a tied head has initialised the table with another standard deviation.
        self.target_embedding.reset_parameters()
