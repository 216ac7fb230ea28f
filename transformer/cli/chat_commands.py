"""Commands inside a chat, as one table: name, argument, help and action."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from ..errors import ArgumentError
from .chat_session import ChatSession
from .lines import QUOTES
from .output import notify


@dataclass(frozen=True)
class Command:
    """A command. `argument`: "FILE" or empty. `action`: called with the session, and with the file name if any."""

    name: str
    argument: str
    help: str
    action: Callable[..., None]

    @property
    def usage(self) -> str:
        """The command with its argument, for the help."""
        return f"{self.name} {self.argument}".rstrip()

    def run(self, session: ChatSession, given: str) -> None:
        """Runs the command. Raises ArgumentError for a missing or superfluous argument, and as the action does."""
        if self.argument and not given:
            raise ArgumentError(f"{self.name} needs a file name: {self.usage}")
        if given and not self.argument:
            raise ArgumentError(f"{self.name} takes no argument, got {given}")
        self.action(session, *([given] if given else []))


COMMANDS = (
    Command("/help", "", "list the commands", lambda _session: notify(help_text())),
    Command("/history", "", "show all messages", ChatSession.show_history),
    Command("/retry", "", "answer the last message again, with other random numbers", ChatSession.retry),
    Command("/undo", "", "remove the last message and its answer", ChatSession.undo),
    Command("/clear", "", "remove all turns; the text of --system stays", ChatSession.clear),
    Command("/fork", "", "keep a copy of the conversation", ChatSession.fork),
    Command("/back", "", "go back to the copy, as often as you like", ChatSession.back),
    Command("/save", "FILE", "write the conversation into FILE", ChatSession.save),
    Command("/load", "FILE", "continue the conversation in FILE", ChatSession.load),
    Command("/quit", "", "end the chat; so do /exit, Ctrl-D, and Ctrl-C twice", ChatSession.end),
)

OTHER_NAMES = {"/exit": "/quit"}
"""Other names of commands."""


def help_text() -> str:
    """Help of the chat: a line for each command, and the input of messages of several lines."""
    width = max(len(command.usage) for command in COMMANDS)
    lines = [f"{command.usage:{width}}  {command.help}" for command in COMMANDS]
    return "\n".join(
        [
            *lines,
            f"{QUOTES} begins and ends a message of several lines, or one whose first character is /",
            "Ctrl-C ends an answer",
        ]
    )


def run_command(session: ChatSession, line: str) -> None:
    """Runs the command in a line. Raises ArgumentError for an unknown command, and as the command does."""
    name, _, argument = line.strip().partition(" ")
    commands = {command.name: command for command in COMMANDS}
    commands |= {other: commands[known] for other, known in OTHER_NAMES.items()}
    if name in commands:
        commands[name].run(session, argument.strip())
        return
    nearest = get_close_matches(name.lower(), commands, n=1)
    meant = f", the nearest is {nearest[0]}" if nearest else ""
    raise ArgumentError(
        f"there is no command {name}{meant}; /help lists them. To send it as a message: {QUOTES}{line.strip()}{QUOTES}"
    )
