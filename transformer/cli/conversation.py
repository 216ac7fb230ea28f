"""Conversation with a model whose caches keep the earlier turns: answer, undo, copy and restore."""

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
class Transcript:
    """The messages and tokens of a conversation, and the number of tokens before each turn."""

    messages: tuple[Message, ...] = ()
    tokens: tuple[int, ...] = ()
    turns: tuple[int, ...] = ()


@dataclass(frozen=True)
class SavedConversation:
    """A conversation outside of a model: its transcript and its cache."""

    transcript: Transcript
    cache: KVCache


@dataclass(frozen=True)
class Cost:
    """Tokens that an answer read and wrote."""

    read: int
    written: int


SYSTEM = "system"
"""Role of the system message, which does not belong to a turn."""

PROBE = {"role": "user", "content": "Hello"}
"""Message that shows whether a chat template writes the system message."""


class Conversation:
    """A conversation in the caches of a model, which contain its first tokens, usually all of them.

    `system` is the text before the first turn: the system message of the chat template, or the first line without a
    template. `clear` restores it. Raises ArgumentError if the template does not write a system message.
    """

    def __init__(self, model: DecoderOnlyTransformer, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._model = model.enable_cache()
        self._tokenizer = tokenizer
        self.given_system = system
        self.transcript = _new_transcript(system)
        if system is not None and self._prompt_tokens(self.transcript, PROBE) == self._prompt_tokens(
            Transcript(), PROBE
        ):
            raise ArgumentError(
                "--system: expected a model whose chat template writes it, got a template that leaves it out"
            )

    @property
    def cache(self) -> KVCache:
        """The caches of the model."""
        return KVCache.from_model(self._model)

    @property
    def system(self) -> str | None:
        """The current system text: the given one, or that of a restored conversation."""
        return next((each["content"] for each in self.transcript.messages[:1] if each["role"] == SYSTEM), None)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def ask(self, text: str, show: Callable[[str], None], **options: Any) -> Cost:
        """Reads a message of the user and shows the answer token by token; Ctrl-C ends the answer.

        Only new tokens are read. Raises as `stream` does; the conversation is then unchanged.
        """
        return self._answer(self.transcript, {"role": "user", "content": text}, show, options)

    def ask_again(self, show: Callable[[str], None], **options: Any) -> Cost:
        """Answers the last message again, as `ask` does. Raises ArgumentError if there is none."""
        before = self._without_last_turn("/retry")
        return self._answer(before, self.transcript.messages[-2], show, options)

    def undo(self) -> None:
        """Removes the last turn. Raises ArgumentError if there is none."""
        before = self._without_last_turn("/undo")
        self._truncate(len(before.tokens))
        self.transcript = before

    def clear(self) -> None:
        """Removes all turns. The system text is then the given `system`, else the current one."""
        self.cache.clear()
        self.transcript = _new_transcript(self.system if self.given_system is None else self.given_system)

    def copy(self) -> SavedConversation:
        """A copy for `restore`. It shares memory with this conversation until one of the two continues."""
        # After two interrupts in one answer, the cache can have more tokens than the transcript.
        self._truncate(len(self.transcript.tokens))
        return SavedConversation(self.transcript, self.cache.fork())

    def restore(self, copy: SavedConversation) -> None:
        """Continues a copy, on the model's device. Raises ArgumentError, without changes, if it has another model."""
        vocabulary = self._model.config.vocab_size
        if max(copy.transcript.tokens, default=0) >= vocabulary:
            raise ArgumentError(
                f"tokens: expected ids below {vocabulary}, as of this model, got {max(copy.transcript.tokens)}"
            )
        # A conversation from a file is on the CPU.
        copy.cache.to(self._device)
        before = self.cache.remove(self._model)
        try:
            copy.cache.install(self._model, check_weights=True)
        except BaseException:
            before.install(self._model)
            raise
        self.transcript = copy.transcript

    def _prompt_tokens(self, transcript: Transcript, message: Message) -> tuple[int, ...]:
        """All tokens before the answer to a message."""
        messages = [*transcript.messages, message]
        if self._tokenizer.template is not None:
            return tuple(self._tokenizer.encode_chat(messages))
        # Plain text: each message is a line.
        if transcript.tokens:
            return (*transcript.tokens, *self._tokenizer.encode(f"\n{message['content']}", begins=False))
        return tuple(self._tokenizer.encode("\n".join(each["content"] for each in messages)))

    def _truncate(self, length: int) -> None:
        """Truncates the cache; clears it if a window has evicted tokens, which the next turn then reads again."""
        cache = self.cache
        if length < cache.length:
            try:
                cache.truncate(length)
            except CacheStateError:
                cache.clear()

    def _answer(
        self, transcript: Transcript, message: Message, show: Callable[[str], None], options: dict[str, Any]
    ) -> Cost:
        """Answers a message after a transcript, of which the cache may contain more or fewer tokens."""
        planned = self._prompt_tokens(transcript, message)
        options = options | self._room_after(len(planned), options["max_new_tokens"])
        # A chat template can write earlier turns differently when there are more turns; these tokens are read again.
        known = _common_prefix_length(planned[:-1], self.transcript.tokens[: self.cache.length])
        self._truncate(known)
        begin = self.cache.length
        unread = torch.tensor([planned[begin:]], device=self._device)
        written: list[int] = []
        stream, answer = self._tokenizer.stream(options.get("stop_strings", ())), ""
        try:
            with suppress(KeyboardInterrupt):
                for token in self._model.stream(unread, **options):
                    written.append(int(token))
                    piece = stream.give(written[-1])
                    answer += piece
                    show(piece)
        except BaseException:
            self._truncate(known)
            raise
        left = stream.rest()
        tokens = (*planned, *written)
        self._truncate(len(tokens))
        messages = (*transcript.messages, message, {"role": "assistant", "content": answer + left})
        self.transcript = Transcript(messages, tokens, (*transcript.turns, len(transcript.tokens)))
        show(left)
        return Cost(len(planned) - begin, len(written))

    def _room_after(self, length: int, wanted: int) -> dict[str, int]:
        """The option `max_new_tokens`, limited by the positions of the model. Raises ArgumentError if none is left."""
        most = self._model.max_positions
        if most is None:
            return {}
        if length >= most:
            raise ArgumentError(
                f"the conversation would be {length:,} tokens long, and the model can read {most:,}: "
                "/undo takes the last turn back, /clear all of them"
            )
        return {"max_new_tokens": min(wanted, most - length)}

    def _without_last_turn(self, command: str) -> Transcript:
        transcript = self.transcript
        if not transcript.turns:
            raise ArgumentError(f"{command}: there is no turn yet")
        *turns, length = transcript.turns
        return Transcript(transcript.messages[:-2], transcript.tokens[:length], tuple(turns))


def _new_transcript(system: str | None) -> Transcript:
    return Transcript() if system is None else Transcript(({"role": SYSTEM, "content": system},))


def _common_prefix_length(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """The length of the longest common prefix of two token sequences."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
