"""Chat session at the terminal: the actions of its commands, and their notices."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .conversation import Conversation, Cost, SavedConversation
from .output import notify, write
from .saved import load, save


class ChatSession:
    """A conversation, the generation options of its answers, and the copy that /fork keeps."""

    def __init__(self, conversation: Conversation, options: dict[str, Any]) -> None:
        self.ended = False
        self._conversation = conversation
        self._options = options
        self._kept: SavedConversation | None = None

    def answer(self, text: str) -> None:
        """Answers a message, unless it is empty."""
        if text.strip():
            self._write(lambda show: self._conversation.ask(text, show, **self._options))

    def retry(self) -> None:
        """Answers the last message again, with other random numbers."""
        if self._conversation.transcript.turns and not self._options["temperature"]:
            notify("the temperature is 0, so the answer is the same; start with --temperature 0.7 for others")
        self._write(lambda show: self._conversation.ask_again(show, **self._options))

    def undo(self) -> None:
        """Removes the last message and its answer."""
        self._conversation.undo()
        notify(f"last turn taken back; {self._length()} remain")

    def clear(self) -> None:
        """Restarts the conversation."""
        self._conversation.clear()
        notify("cleared")

    def show_history(self) -> None:
        """Shows all messages."""
        messages = self._conversation.transcript.messages
        if not messages:
            notify("nothing was said yet")
        for message in messages:
            notify(f"{message['role']}:\n{message['content']}")

    def save(self, file: str) -> None:
        """Writes the conversation into a file."""
        save(self._conversation.copy(), _path(file))
        notify(f"saved in {file}")

    def load(self, file: str) -> None:
        """Continues a saved conversation."""
        self._conversation.restore(load(_path(file)))
        notify(f"loaded: {self._length()}")
        self._notify_other_system()

    def fork(self) -> None:
        """Keeps a copy."""
        self._kept = self._conversation.copy()
        notify(f"copy kept: {self._length()}; /back goes back to it")

    def back(self) -> None:
        """Goes back to the copy."""
        if self._kept is None:
            raise ArgumentError("/back: there is no copy to go back to; /fork keeps one")
        self._conversation.restore(SavedConversation(self._kept.transcript, self._kept.cache.fork()))
        notify(f"went back to the copy: {self._length()}")

    def end(self) -> None:
        """Ends the chat."""
        self.ended = True

    def _write(self, ask: Callable[[Callable[[str], None]], Cost]) -> None:
        start = time.perf_counter()
        cost = ask(write)
        seconds = time.perf_counter() - start
        write("\n")
        notify(
            f"{_plural(cost.read, 'token')} read, {cost.written:,} written, {cost.written / seconds:,.1f} tokens/s, "
            f"cache {self._conversation.cache.nbytes:,} bytes"
        )

    def _notify_other_system(self) -> None:
        """Shows a notice if a loaded conversation has another system text than --system."""
        loaded, given = self._conversation.system, self._conversation.given_system
        if loaded == given:
            return
        has = "has no system text" if loaded is None else "has a system text of its own, which /history shows"
        notify(f"this conversation {has}" + ("" if given is None else "; /clear goes back to that of --system"))

    def _length(self) -> str:
        transcript = self._conversation.transcript
        return f"{_plural(len(transcript.turns), 'turn')}, {_plural(len(transcript.tokens), 'token')}"


def _plural(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _path(file: str) -> Path:
    """The path of a file name from the user. Raises ArgumentError for an unknown home folder."""
    try:
        return Path(file).expanduser()
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(f"{file}: expected ~ or ~USER with a home folder, got an unknown user") from error
