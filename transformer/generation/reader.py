"""What generation needs of a model: to read tokens, to say what comes next, and to lend its caches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from ..cache import CacheOwner, KVCache
from ..errors import ArgumentError
from .options import UseCache
from .session import Session


class Reader(ABC):
    """A model as generation sees it."""

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


class ForwardReader(Reader):
    """Any module whose forward takes `(tokens, attention_mask=...)` and gives logits [B, L, V].

    Its attention modules with `use_kv_cache=True` hold the conversation, which generation then continues.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def read(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        logits: Tensor = self.model(tokens, attention_mask=attention_mask)
        return logits[:, -1]

    def select(self, rows: Sequence[int]) -> None:
        """There is nothing else."""

    def session(self, use_cache: UseCache, _: int) -> Session:
        found = [module for module in self.model.modules() if isinstance(module, CacheOwner)]
        remembering = [owner for owner in found if owner.use_kv_cache]
        if not use_cache or (use_cache == "auto" and not remembering):
            return Session.without_caches(remembering)
        if not remembering:
            raise ArgumentError(
                "use_cache: expected a model with caches, got one whose attention modules all have use_kv_cache=False; "
                "set it, or give use_cache=False"
            )
        return Session.live(KVCache.from_model(self.model), remembering)
