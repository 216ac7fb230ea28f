"""A conversation with a model, of which the caches remember what was said: turns, taken back, kept and saved."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..cache import KVCache
from ..checkpoints import Message, Tokenizer
from ..errors import ArgumentError, CacheStateError
from ..models import DecoderOnlyTransformer


@dataclass(frozen=True)
class Said:
    """What was said, as messages and as tokens, and how many tokens there were before each turn."""

    messages: tuple[Message, ...] = ()
    tokens: tuple[int, ...] = ()
    turns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Copy:
    """A conversation that is in no model."""

    said: Said
    cache: KVCache


@dataclass(frozen=True)
class Cost:
    """What an answer took: tokens read of what was new, and tokens written."""

    read: int
    written: int


SYSTEM = "system"
"""The role of the message that is no turn."""

PROBE = {"role": "user", "content": "Hello"}
"""A turn to try a chat template with."""


class Conversation:
    """A conversation in a model whose caches are on: they have read some of its first tokens, usually all.

    `system` is what the model is told before the first turn: a system message of the chat template, or the first line
    of a text; `clear` goes back to it. Raises ArgumentError where the template takes none.
    """

    def __init__(self, model: DecoderOnlyTransformer, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._model = model.enable_cache()
        self._tokenizer = tokenizer
        self.given_system = system
        self.said = _beginning(system)
        if system is not None and self._planned(self.said, PROBE) == self._planned(Said(), PROBE):
            raise ArgumentError("--system: expected a model whose chat template writes it, got one that leaves it out")

    @property
    def cache(self) -> KVCache:
        """What the model has read."""
        return KVCache.from_model(self._model)

    @property
    def system(self) -> str | None:
        """What the model is told before the first turn: the given text, or that of a copy which was gone on with."""
        return next((each["content"] for each in self.said.messages[:1] if each["role"] == SYSTEM), None)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def ask(self, text: str, show: Callable[[str], None], **options: Any) -> Cost:
        """Reads a turn of the user and shows the answer as it comes; Ctrl-C ends it there.

        Only what is new is read. Raises as `stream` does, and the conversation is then as it was.
        """
        return self._answer(self.said, {"role": "user", "content": text}, show, options)

    def ask_again(self, show: Callable[[str], None], **options: Any) -> Cost:
        """Answers the last turn anew, as `ask` does. Raises ArgumentError where there is none."""
        before = self._before_the_last_turn("/retry")
        return self._answer(before, self.said.messages[-2], show, options)

    def undo(self) -> None:
        """Takes the last turn and its answer back. Raises ArgumentError where there is none."""
        before = self._before_the_last_turn("/undo")
        self._forget(len(before.tokens))
        self.said = before

    def clear(self) -> None:
        """Takes all turns back. What the model is told before them is the given `system`, else what it was."""
        self.cache.clear()
        self.said = _beginning(self.system if self.given_system is None else self.given_system)

    def copy(self) -> Copy:
        """A copy to go back to. It costs nothing until one of the two goes on."""
        # An answer that Ctrl-C ended twice may have been read further than it was noted.
        self._forget(len(self.said.tokens))
        return Copy(self.said, self.cache.fork())

    def go_on_with(self, copy: Copy) -> None:
        """Takes a copy's place, on the model's device; raises ArgumentError where it is not of this model, and nothing
        has changed."""
        vocabulary = self._model.config.vocab_size
        if max(copy.said.tokens, default=0) >= vocabulary:
            raise ArgumentError(
                f"tokens: expected ids below {vocabulary}, as of this model, got {max(copy.said.tokens)}"
            )
        # A file is read onto the CPU.
        copy.cache.to(self._device)
        before = self.cache.remove(self._model)
        try:
            copy.cache.install(self._model, check_weights=True)
        except BaseException:
            before.install(self._model)
            raise
        self.said = copy.said

    def _planned(self, said: Said, message: Message) -> tuple[int, ...]:
        """All tokens up to where the answer to a message begins."""
        messages = [*said.messages, message]
        if self._tokenizer.template is not None:
            return tuple(self._tokenizer.encode_chat(messages))
        # Plain text: each turn begins a line, which the model goes on with.
        if said.tokens:
            return (*said.tokens, *self._tokenizer.encode(f"\n{message['content']}", begins=False))
        return tuple(self._tokenizer.encode("\n".join(each["content"] for each in messages)))

    def _forget(self, length: int) -> None:
        """Goes back to so many tokens; what a window has let go of is read again at the next turn."""
        cache = self.cache
        if length < cache.length:
            try:
                cache.truncate(length)
            except CacheStateError:
                cache.clear()

    def _answer(self, said: Said, message: Message, show: Callable[[str], None], options: dict[str, Any]) -> Cost:
        """Answers a message after what was said, of which the model may have read more or less."""
        planned = self._planned(said, message)
        options = options | self._room_after(len(planned), options["max_new_tokens"])
        # A chat template may write earlier turns in another way once there are more: what differs is read again.
        known = _alike(planned[:-1], self.said.tokens[: self.cache.length])
        self._forget(known)
        begin = self.cache.length
        unread = torch.tensor([planned[begin:]], device=self._device)
        written: list[int] = []
        stream, answer = self._tokenizer.stream(), ""
        try:
            with suppress(KeyboardInterrupt):
                for token in self._model.stream(unread, **options):
                    written.append(int(token))
                    piece = stream.give(written[-1])
                    answer += piece
                    show(piece)
        except BaseException:
            self._forget(known)
            raise
        left = stream.rest()
        tokens = (*planned, *written)
        self._forget(len(tokens))
        messages = (*said.messages, message, {"role": "assistant", "content": answer + left})
        self.said = Said(messages, tokens, (*said.turns, len(said.tokens)))
        show(left)
        return Cost(len(planned) - begin, len(written))

    def _room_after(self, length: int, wanted: int) -> dict[str, int]:
        """As many new tokens as the model has positions for. Raises ArgumentError where there are none left."""
        most = self._model.max_positions
        if most is None:
            return {}
        if length >= most:
            raise ArgumentError(
                f"the conversation would be {length:,} tokens long, and the model can read {most:,}: "
                "/undo takes the last turn back, /clear all of them"
            )
        return {"max_new_tokens": min(wanted, most - length)}

    def _before_the_last_turn(self, command: str) -> Said:
        said = self.said
        if not said.turns:
            raise ArgumentError(f"{command}: there is no turn yet")
        *turns, length = said.turns
        return Said(said.messages[:-2], said.tokens[:length], tuple(turns))


def _beginning(system: str | None) -> Said:
    return Said() if system is None else Said(({"role": SYSTEM, "content": system},))


def _alike(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens two rows begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
