"""A chat at the terminal: what its commands do to the conversation, and what is told of it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .conversation import Conversation, Copy, Cost
from .output import tell
from .saved import load, save


class ChatSession:
    """A conversation, the options that its answers are generated with, and a copy that was kept of it."""

    def __init__(self, conversation: Conversation, options: dict[str, Any]) -> None:
        self.ended = False
        self._conversation = conversation
        self._options = options
        self._kept: Copy | None = None

    def answer(self, text: str) -> None:
        """Answers a message; nothing, where it is empty."""
        if text.strip():
            self._write(lambda show: self._conversation.ask(text, show, **self._options))

    def retry(self) -> None:
        """Answers the last message again, by other random numbers."""
        if not self._options["temperature"]:
            tell("the temperature is 0, so the answer is the same; start with --temperature 0.7 for others")
        self._write(lambda show: self._conversation.ask_again(show, **self._options))

    def undo(self) -> None:
        """Takes the last message and its answer back."""
        self._conversation.undo()
        self._tell_length("taken back")

    def clear(self) -> None:
        """Begins the conversation anew."""
        self._conversation.clear()
        self._tell_length("cleared")

    def show_history(self) -> None:
        """Tells what was said."""
        messages = self._conversation.said.messages
        if not messages:
            tell("nothing was said yet")
        for message in messages:
            tell(f"{message['role']}:\n{message['content']}")

    def save(self, file: str) -> None:
        """Writes the conversation into a file."""
        save(self._conversation.copy(), Path(file).expanduser())
        tell(f"saved in {file}")

    def load(self, file: str) -> None:
        """Goes on with a saved conversation."""
        self._conversation.go_on_with(load(Path(file).expanduser()))
        self._tell_length("going on")

    def fork(self) -> None:
        """Keeps a copy."""
        self._kept = self._conversation.copy()
        self._tell_length("kept; /back goes back to it")

    def back(self) -> None:
        """Goes back to the copy."""
        if self._kept is None:
            raise ArgumentError("/back: there is no copy to go back to; /fork keeps one")
        self._conversation.go_on_with(Copy(self._kept.said, self._kept.cache.fork()))
        self._tell_length("back")

    def end(self) -> None:
        """Ends the chat."""
        self.ended = True

    def _write(self, ask: Callable[[Callable[[str], None]], Cost]) -> None:
        start = time.perf_counter()
        cost = ask(lambda piece: print(piece, end="", flush=True))
        seconds = time.perf_counter() - start
        print(flush=True)
        tell(
            f"{cost.read:,} tokens read, {cost.written:,} written, {cost.written / seconds:,.1f} tokens/s, "
            f"cache {self._conversation.cache.nbytes:,} bytes"
        )

    def _tell_length(self, what: str) -> None:
        said = self._conversation.said
        turns = "1 turn" if len(said.turns) == 1 else f"{len(said.turns)} turns"
        tell(f"{what}: {turns}, {len(said.tokens):,} tokens")
