"""The side of a model that generation needs: reading tokens, saying what comes next, and lending its caches."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from ..cache import holders
from ..cache.holder import CacheHolder
from ..errors import ArgumentError
from .options import UseCache
from .session import Session


class LendsCaches(ABC):
    """A whole model that says itself which caches a generation goes over."""

    @abstractmethod
    def session(self, use_cache: UseCache, most_new_tokens: int) -> Session:
        """The caches of one generation, in which a row gets at most so many new tokens.

        Raises ArgumentError where the model cannot give what is asked for.
        """

    @abstractmethod
    def check_prompt(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """Raises ArgumentError where ids int64 [B, L] are not in the vocabulary."""

    @abstractmethod
    def check_room(self, session: Session, prompts: Sequence[int], new: Sequence[int]) -> None:
        """Raises ArgumentError or CacheFullError where a row cannot get so much longer in this session.

        `prompts` and `new` are the real tokens of each row's prompt, and the most new ones after it.
        """


class ModelAdapter(ABC):
    """A model as generation sees it."""

    known_prompt = False
    """Whether the prompt's ids are known to be in the vocabulary."""
    sharded = False
    """Whether the model's weights are put together for each call, and what was put together is kept for training."""

    @abstractmethod
    def read(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, V] after the last column of `tokens` int64 [B, L], of which `attention_mask` bool [B, L] are real.

        With caches these are the tokens that were not read yet, without them all. Rows of different lengths are padded
        on the left.
        """

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order, of whatever else the model reads from; caches are not its concern."""

    @abstractmethod
    def session(self, use_cache: UseCache, most_new_tokens: int) -> Session:
        """The caches of one generation, in which a row gets at most so many new tokens.

        Raises ArgumentError where the model cannot give what is asked for.
        """

    def check_room(self, session: Session, prompts: Sequence[int], new: Sequence[int]) -> None:  # noqa: B027
        """Raises ArgumentError or CacheFullError where the model knows that a row cannot get so much longer.

        `prompts` and `new` are the real tokens of each row's prompt, and the most new ones after it.
        """


class ForwardAdapter(ModelAdapter):
    """Any module whose forward takes `(tokens, attention_mask=...)` and gives logits [B, L, V].

    The module itself is called, so its hooks, and whatever wraps it, see each step. A whole model of this library lends
    its caches, wherever it stands inside; in any other module attention with `use_kv_cache=True` holds the
    conversation, which generation then continues.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.sharded = is_sharded(model)
        self._lending = next((module for module in model.modules() if isinstance(module, LendsCaches)), None)
        self._options = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}

    def check_prompt(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """Raises ArgumentError where the model knows that ids are not in its vocabulary."""
        if isinstance(self.model, LendsCaches):
            self.model.check_prompt(tokens, attention_mask)
            self.known_prompt = True

    def read(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        logits: Tensor = self.model(tokens, attention_mask=attention_mask, **self._options)
        return logits[:, -1]

    def select(self, rows: Sequence[int]) -> None:
        """There is nothing else."""

    def check_room(self, session: Session, prompts: Sequence[int], new: Sequence[int]) -> None:
        if self._lending is not None:
            self._lending.check_room(session, prompts, new)

    def session(self, use_cache: UseCache, most_new_tokens: int) -> Session:
        modules = self.model.modules()
        found = holders(self.model) if any(isinstance(module, CacheHolder) for module in modules) else {}
        if self._lending is not None:
            session = self._lending.session(use_cache, most_new_tokens)
            # A conversation elsewhere in the wrapper, as of a second model, is kept out of the way too.
            return Session.without_caches(found) if session.cache is None else session
        remembering = any(holder.use_kv_cache for holder in found.values())
        if not use_cache or (use_cache == "auto" and not remembering):
            return Session.without_caches(found)
        if not remembering:
            raise ArgumentError(
                "use_cache: expected a model with caches, got one whose attention modules all have use_kv_cache=False; "
                "set it, or give use_cache=False"
            )
        return Session.live(found)


def is_sharded(model: nn.Module) -> bool:
    """Whether some weight is no plain parameter, or FSDP wraps a module.

    FSDP keeps the tensors that it gathers weights into: made in inference mode, they could not be trained on later.
    """
    if any(type(parameter) is not nn.Parameter for parameter in model.parameters()):
        return True
    return any("_fsdp_wrapped_module" in module._modules for module in model.modules())


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward has an argument of that name."""
    try:
        return name in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        # A forward without a signature, as some compiled ones are.
        return False
