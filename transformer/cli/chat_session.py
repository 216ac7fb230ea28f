"""A chat at the terminal: what its commands do to the conversation, and what is told of it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .conversation import Conversation, Copy, Cost
from .output import tell, write
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
        if self._conversation.said.turns and not self._options["temperature"]:
            tell("the temperature is 0, so the answer is the same; start with --temperature 0.7 for others")
        self._write(lambda show: self._conversation.ask_again(show, **self._options))

    def undo(self) -> None:
        """Takes the last message and its answer back."""
        self._conversation.undo()
        tell(f"last turn taken back; {self._length()} remain")

    def clear(self) -> None:
        """Begins the conversation anew."""
        self._conversation.clear()
        tell("cleared")

    def show_history(self) -> None:
        """Tells what was said."""
        messages = self._conversation.said.messages
        if not messages:
            tell("nothing was said yet")
        for message in messages:
            tell(f"{message['role']}:\n{message['content']}")

    def save(self, file: str) -> None:
        """Writes the conversation into a file."""
        save(self._conversation.copy(), _path(file))
        tell(f"saved in {file}")

    def load(self, file: str) -> None:
        """Goes on with a saved conversation."""
        self._conversation.go_on_with(load(_path(file)))
        tell(f"loaded: {self._length()}")
        self._tell_another_system()

    def fork(self) -> None:
        """Keeps a copy."""
        self._kept = self._conversation.copy()
        tell(f"copy kept: {self._length()}; /back goes back to it")

    def back(self) -> None:
        """Goes back to the copy."""
        if self._kept is None:
            raise ArgumentError("/back: there is no copy to go back to; /fork keeps one")
        self._conversation.go_on_with(Copy(self._kept.said, self._kept.cache.fork()))
        tell(f"went back to the copy: {self._length()}")

    def end(self) -> None:
        """Ends the chat."""
        self.ended = True

    def _write(self, ask: Callable[[Callable[[str], None]], Cost]) -> None:
        start = time.perf_counter()
        cost = ask(write)
        seconds = time.perf_counter() - start
        write("\n")
        tell(
            f"{_counted(cost.read, 'token')} read, {cost.written:,} written, {cost.written / seconds:,.1f} tokens/s, "
            f"cache {self._conversation.cache.nbytes:,} bytes"
        )

    def _tell_another_system(self) -> None:
        """Tells of a loaded conversation where it has another system text than that of --system."""
        loaded, given = self._conversation.system, self._conversation.given_system
        if loaded == given:
            return
        has = "has no system text" if loaded is None else "has a system text of its own, which /history shows"
        tell(f"this conversation {has}" + ("" if given is None else "; /clear goes back to that of --system"))

    def _length(self) -> str:
        said = self._conversation.said
        return f"{_counted(len(said.turns), 'turn')}, {_counted(len(said.tokens), 'token')}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _path(file: str) -> Path:
    """The path of a file that the user names. Raises ArgumentError where it begins in an unknown home folder."""
    try:
        return Path(file).expanduser()
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(f"{file}: expected ~ or ~USER with a home folder, got one that is not known") from error
