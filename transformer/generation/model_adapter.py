"""Interfaces between generation and a model: reading tokens, giving logits, and providing caches."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..cache import holders
from ..cache.holder import CacheHolder
from ..errors import ArgumentError
from .option_types import GenerationKeywords, UseCache
from .session import Session


class CacheProvider(ABC):
    """A model that chooses the caches of a generation itself."""

    @abstractmethod
    def session(self, use_cache: UseCache, max_new_tokens: int) -> Session:
        """The caches of one generation with at most `max_new_tokens` new tokens per row.

        Raises ArgumentError if the model has no such caches.
        """

    @abstractmethod
    def check_prompt(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """Raises ArgumentError if ids int64 [B, L] are not in the vocabulary."""

    def embedded(self, tokens: Tensor) -> Tensor:  # noqa: ARG002 (of an interface)
        """The vectors [B, L, E] that the model reads for ids int64 [B, L].

        Raises ArgumentError if the model does not take vectors.
        """
        raise no_vectors(self)

    @abstractmethod
    def check_room(self, session: Session, prompts: Sequence[int], new: Sequence[int]) -> None:
        """Raises ArgumentError or CacheFullError if the session has no room for a row.

        `prompts`: real tokens in the prompt of each row. `new`: maximum number of new tokens of each row.
        """

    def generating(self, options: GenerationKeywords) -> GenerationKeywords:
        """The options of a generation, with the model's own where they give no others."""
        return options


class ModelAdapter(ABC):
    """Interface of a model for generation."""

    known_prompt = False
    """True if the ids of the prompt are known to be in the vocabulary."""
    source: tuple[Tensor, Tensor | None] | None = None
    """An encoded source that each call gives to cross-attention as it is, and its mask (bool); None: nothing is known.
    It changes in `select` alone."""
    sharded = False
    """True if the model gathers its weights in each call, into tensors that training uses again."""

    @abstractmethod
    def read(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, V] after the last column of `tokens` int64 [B, L]; `attention_mask` bool [B, L]: real tokens.

        Of a prompt of vectors `tokens` are vectors [B, L, E]. With caches `tokens` are the tokens that were not read
        yet, without caches all tokens. Rows of different lengths have padding on the left.
        """

    def read_last(self, tokens: Tensor, attention_mask: Tensor | None, count: int) -> Tensor:  # noqa: ARG002
        """Logits [B, count, V] after each of the last `count` columns; padding may then be on the right.

        Speculative decoding reads guesses so. Raises ArgumentError if the adapter does not have it.
        """
        raise ArgumentError(
            "assistant_model, prompt_lookup_num_tokens: expected a model, or an adapter with read_last(tokens, "
            f"attention_mask, count), got {type(self).__name__}"
        )

    def read_prefix(self, tokens: Tensor, attention_mask: Tensor | None, lengths: Tensor) -> Tensor:  # noqa: ARG002
        """As `read`; the first `lengths` int64 [B] tokens of each row, padding not counted, see each other.

        Raises ArgumentError if the adapter does not have it.
        """
        raise no_prefix(self)

    def modules(self) -> Iterable[nn.Module]:
        """The modules of the model, where they are known."""
        return ()

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order, of other inputs of the model; generation selects the rows of caches."""

    @abstractmethod
    def session(self, use_cache: UseCache, max_new_tokens: int) -> Session:
        """The caches of one generation with at most `max_new_tokens` new tokens per row.

        Raises ArgumentError if the model has no such caches.
        """

    def embedded(self, tokens: Tensor) -> Tensor:  # noqa: ARG002 (of an interface)
        """The vectors [B, L, E] of ids int64 [B, L]: those that follow a prompt of vectors where there are no caches.

        Raises ArgumentError if the model does not take vectors.
        """
        raise no_vectors(self)

    def check_room(self, session: Session, prompts: Sequence[int], new: Sequence[int]) -> None:  # noqa: B027
        """Raises ArgumentError or CacheFullError if the model knows that there is no room for a row.

        `prompts`: real tokens in the prompt of each row. `new`: maximum number of new tokens of each row.
        """


class ForwardAdapter(ModelAdapter):
    """Adapter of a module whose forward takes `(tokens, attention_mask=...)` and gives logits [B, L, V].

    The module itself is called, so its hooks and wrappers see each step. A model of this library inside it provides
    the caches. In all other modules the conversation is in the attention modules with `use_kv_cache=True`, and
    generation continues it.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.sharded = is_sharded(model)
        self._provider = next((module for module in model.modules() if isinstance(module, CacheProvider)), None)
        self._keeps = takes(model, "logits_to_keep")

    def check_prompt(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """Raises ArgumentError for ids outside a known vocabulary, and for vectors that the module does not take."""
        if tokens.is_floating_point():
            if not takes(self.model, "inputs_embeds"):
                raise no_vectors(self.model)
        elif isinstance(self.model, CacheProvider):
            self.model.check_prompt(tokens, attention_mask)
            self.known_prompt = True

    def modules(self) -> Iterable[nn.Module]:
        """Every module of it."""
        return self.model.modules()

    def generating(self, options: GenerationKeywords) -> GenerationKeywords:
        """The options of a generation, with those of the model that provides the caches where they give no others."""
        return options if self._provider is None else self._provider.generating(options)

    def read(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.read_last(tokens, attention_mask, 1)[:, 0]

    def read_prefix(self, tokens: Tensor, attention_mask: Tensor | None, lengths: Tensor) -> Tensor:
        if not takes(self.model, "prefix_lengths"):
            raise no_prefix(self.model)
        return self._read(tokens, attention_mask, 1, prefix_lengths=lengths)[:, 0]

    def read_last(self, tokens: Tensor, attention_mask: Tensor | None, count: int) -> Tensor:
        return self._read(tokens, attention_mask, count)

    def _read(self, tokens: Tensor, attention_mask: Tensor | None, count: int, **given: Tensor) -> Tensor:
        options: dict[str, Any] = {"logits_to_keep": count, **given} if self._keeps else given
        if tokens.is_floating_point():
            logits: Tensor = self.model(inputs_embeds=tokens, attention_mask=attention_mask, **options)
        else:
            logits = self.model(tokens, attention_mask=attention_mask, **options)
        return logits[:, -count:]

    def embedded(self, tokens: Tensor) -> Tensor:
        if self._provider is None:
            return super().embedded(tokens)
        return self._provider.embedded(tokens)

    def select(self, rows: Sequence[int]) -> None:
        """Does nothing: the module has no other inputs."""

    def check_room(self, session: Session, prompts: Sequence[int], new: Sequence[int]) -> None:
        if self._provider is not None:
            self._provider.check_room(session, prompts, new)

    def session(self, use_cache: UseCache, max_new_tokens: int) -> Session:
        modules = self.model.modules()
        found = holders(self.model) if any(isinstance(module, CacheHolder) for module in modules) else {}
        if self._provider is not None:
            session = self._provider.session(use_cache, max_new_tokens)
            # Caches outside of the provider, such as those of a second model in the wrapper, are off as well.
            return Session.without_caches(found) if session.cache is None else session
        has_caches = any(holder.use_kv_cache for holder in found.values())
        if not use_cache or (use_cache == "auto" and not has_caches):
            return Session.without_caches(found)
        if not has_caches:
            kind = type(self.model).__name__
            raise ArgumentError(
                f"use_cache: expected a model with caches, got {kind} with use_kv_cache=False in all attention "
                "modules; set use_kv_cache=True, or give use_cache=False"
                if found
                else f"use_cache: expected attention modules of this library, got {kind}, which has none; give "
                "use_cache=False, or call the model's own generate"
            )
        return Session.live(found)


def no_prefix(model: object) -> ArgumentError:
    """The error for a prompt in both directions that a model or an adapter does not take."""
    return ArgumentError(
        "bidirectional_prompt: expected a model whose forward takes prefix_lengths, as a DecoderOnlyTransformer's, got "
        f"{type(model).__name__}"
    )


def no_vectors(model: object) -> ArgumentError:
    """The error for vectors in place of ids that a model or an adapter does not take."""
    return ArgumentError(
        f"inputs_embeds: expected a model that takes inputs_embeds in place of ids, got {type(model).__name__}"
    )


def is_sharded(model: nn.Module) -> bool:
    """True if a weight is not a plain parameter, or FSDP wraps a module.

    FSDP keeps the tensors into which it gathers weights; inference tensors could not be used in training later.
    """
    if any(type(parameter) is not nn.Parameter for parameter in model.parameters()):
        return True
    return any("_fsdp_wrapped_module" in module._modules for module in model.modules())


def takes(module: nn.Module, name: str) -> bool:
    """True if the forward of a module has an argument of this name."""
    try:
        return name in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        # Some compiled forwards have no signature.
        return False
