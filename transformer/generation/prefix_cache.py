"""Generation that reads only what is new of a prompt: conversations are kept, and found again by their tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..cache import KVCache, holders
from ..cache.origin import Origin
from ..errors import ArgumentError, shown
from .assistant import assistant_of, check_can_speculate
from .beams import best
from .decoding import CachedDecoding
from .generated import Generated, returned, tokens_of
from .keywords import generation_options
from .model_adapter import ForwardAdapter
from .option_types import GenerationKeywords
from .options import GenerationOptions
from .prefix_store import Match, PrefixStore
from .prompt import Prompt
from .separate import separate_adapter, separate_session
from .session import Session
from .shared_by_ranks import check_ranks
from .steps import without_gradients, written
from .turns import Turns


class ContinuedDecoding(CachedDecoding):
    """Decoding of rows that have read the first `read` tokens of their prompts."""

    def __init__(
        self, adapter: ForwardAdapter, session: Session, cache: KVCache, options: GenerationOptions, read: list[int]
    ) -> None:
        super().__init__(adapter, session, cache, options)
        self._known = read

    def begin(self, prompt: Prompt) -> Tensor:
        return super().begin(prompt.after(self._known) if any(self._known) else prompt)


class PrefixCache:
    """Automatic prefix caching: `generate` of a decoder-only model that reads each known prefix of a prompt once.

    After a generation, the prompt and the tokens that were read after it are known. The next prompt continues a copy of
    the longest prefix that is known of it, and only the rest is read. The tokens are those of the model's own
    `generate`. The model's conversation is neither read nor changed, and caches of the model may be on, with their
    options, or off.

    Args:
        model: a module as `generate` takes it, with attention of this library.
        max_bytes: the most bytes of keys and values that are kept; the least recently used conversations go first.

    What is kept is forgotten when weights, or options of caches, have changed: each tensor's version and address tell.
    A change by `.data` in place leaves none of them; `clear()` after it. A sliding window keeps a prefix as long as
    `truncate` reaches back to it. With a `cache_budget`, whose choice depends on the whole prompt, nothing is reused.

    Calls of several threads take turns. Raises ArgumentError for another `max_bytes`, and for a model without caches or
    with cross-attention.
    """

    def __init__(self, model: nn.Module, max_bytes: int) -> None:
        if type(max_bytes) is not int or max_bytes < 0:
            raise ArgumentError(f"max_bytes: expected a whole number of at least 0, got {shown(max_bytes)}")
        self._model = model
        self._adapter = separate_adapter(model)
        self._store = PrefixStore(max_bytes)
        self._made_by: object = None
        self._turns = Turns("prefix_cache")
        self.tokens_saved = 0
        """How many tokens of prompts were known, and not read again, since the beginning."""

    def __len__(self) -> int:
        """How many conversations are kept."""
        return len(self._store)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for what is kept."""
        return self._store.nbytes

    def clear(self) -> None:
        """Forgets all conversations."""
        with self._turns:
            self._store.clear()

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        return_scores: bool = False,
        **options: Unpack[GenerationKeywords],
    ) -> Tensor | Generated:
        """The prompt and the new tokens after it, int64 [B * num_return_sequences, L + N]: as the model's `generate`.

        Rows that begin with one known prefix share its memory while they are written. An exception leaves what is kept
        as it was. `use_cache` is True. Raises as `generation.generate` does.
        """
        if not isinstance(return_scores, bool):
            raise ArgumentError(f"return_scores: expected True or False, got {shown(return_scores)}")
        chosen = generation_options(self._adapter.generating(options))
        if chosen.use_cache is not True:
            raise ArgumentError(f"use_cache: expected True, since prefixes are cached, got {shown(chosen.use_cache)}")
        if chosen.bidirectional_prompt:
            raise ArgumentError(
                "bidirectional_prompt: expected False, since such a prompt has no beginning of another one, got True"
            )
        prompt = Prompt.of(input_ids, attention_mask)
        self._adapter.check_prompt(prompt.tokens, None if prompt.mask is None else prompt.mask.mask)
        assistant = assistant_of(prompt, chosen)
        with self._turns, without_gradients(self._adapter, assistant):
            empty = separate_session(self._adapter)
            if chosen.speculates:
                check_can_speculate(self._adapter, empty, chosen)
            self._adapter.check_room(empty, prompt.lengths, chosen.limits(prompt.lengths))
            if self._adapter.sharded:
                given = {"input_ids": input_ids, "attention_mask": attention_mask}
                check_ranks(self._adapter.modules(), given, chosen)
            self._forget_stale()
            ids, reuses = prompt.rows_on_host(), not empty.compresses
            found = [self._store.longest(row) if reuses else None for row in ids]
            cache, read = _continued(found, empty)
            session = empty if cache is None else empty.separated(cache.layers)
            if session.cache is None:
                raise RuntimeError("generate: expected a session with caches")
            rows = ContinuedDecoding(self._adapter, session, session.cache, chosen, read)
            if chosen.num_beams > 1:
                result, _ = best(rows, prompt, chosen, scored=return_scores)
            else:
                result = written(rows, prompt, chosen, assistant, keep=False, scored=return_scores)
            returns = returned(result, input_ids)
            self._store.use([match.entry for match in found if match is not None])
            if reuses and chosen.num_beams == 1:
                self._store.add(session.cache, _read_by(session.cache, ids, tokens_of(result).cpu()))
            self.tokens_saved += sum(read)
            return returns

    def _forget_stale(self) -> None:
        """Forgets what other weights, or other options of caches, have made."""
        found = holders(self._model)
        made_by = Origin.of(self._model).marked(), [(path, each.cache_spec) for path, each in found.items()]
        if made_by != self._made_by:
            self._store.clear()
            self._made_by = made_by


def _continued(found: Sequence[Match | None], empty: Session) -> tuple[KVCache | None, list[int]]:
    """The conversation of all rows, None where nothing is known of any, and how many tokens each has read."""
    matches = [match for match in found if match is not None]
    if not matches or empty.cache is None:
        return None, [0] * len(found)
    first = matches[0]
    if len(matches) == len(found) and all((each.entry, each.row) == (first.entry, first.row) for each in matches):
        # Cut where all of them are the same, so that they share memory.
        length = min(each.length for each in matches)
        return first._replace(length=length).conversation(len(found)), [length] * len(found)
    nothing = empty.cache
    caches = [nothing if match is None else match.conversation() for match in found]
    return KVCache.join(caches), [0 if match is None else match.length for match in found]


def _read_by(cache: KVCache, prompts: Sequence[Tensor], new: Tensor) -> list[Tensor]:
    """The tokens int64 [n] that each row of a conversation has read: of its prompt, and of the `new` ones [rows, N]."""
    copies = len(new) // len(prompts)
    lengths = cache.lengths.tolist()
    return [torch.cat((prompts[row // copies], new[row]))[:length] for row, length in enumerate(lengths)]
