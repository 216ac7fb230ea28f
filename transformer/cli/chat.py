"""`python -m transformer chat`: a conversation at the terminal, in which only what is new is computed."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import load_tokenizer
from ..errors import ArgumentError, AttentionError
from ..models import DecoderOnlyTransformer
from .conversation import Conversation, Copy, load, save
from .options import add_model, add_sampling, loaded, sampling

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

HELP = """\
/save FILE  write the conversation into FILE and FILE.json
/load FILE  go on with a saved one
/undo       take the last turn and its answer back
/fork       keep a copy of the conversation
/back       go back to the copy, as often as you like
/quit       end; so does the end of the input"""


def add_to(commands: "Commands") -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model, a line a turn. Answers go to the standard output, all else to the other.",
        epilog=f"in the chat:\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_sampling(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Answers each line of the standard input."""
    tokenizer = load_tokenizer(options.model)
    model = loaded(options)
    if not isinstance(model, DecoderOnlyTransformer):
        raise ArgumentError(f"MODEL: expected one that goes on with text, got a {type(model).__name__}")
    how = sampling(options, next(model.parameters()).device)
    how["stop_tokens"] = (*model.config.stop_tokens, *tokenizer.stop_tokens)
    chat = Chat(Conversation(model, tokenizer), how)
    prompt = "> " if sys.stdin.isatty() else ""
    _tell("/help names what there is beside talking")
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip() == "/quit":
            return
        try:
            chat.take(line)
        except (AttentionError, OSError) as error:
            # A mistyped name of a file is no reason to lose a conversation.
            _tell(f"error: {' '.join(str(error).split())}")


class Chat:
    """What lines of the user do to a conversation."""

    def __init__(self, conversation: Conversation, how: dict[str, Any]) -> None:
        self.conversation = conversation
        self.how = how
        self.kept: Copy | None = None

    def take(self, line: str) -> None:
        """Does what a command says, or answers a turn."""
        command, _, rest = line.strip().partition(" ")
        match command, rest.strip():
            case "", _:
                return
            case "/help", "":
                _tell(HELP)
            case "/save", file if file:
                save(self.conversation.copy(), Path(file))
                _tell(f"saved in {file}")
            case "/load", file if file:
                self.conversation.go_on_with(load(Path(file)))
                self._tell_length("going on")
            case "/undo", "":
                self.conversation.undo()
                self._tell_length("taken back")
            case "/fork", "":
                self.kept = self.conversation.copy()
                self._tell_length("kept; /back goes back to it")
            case "/back", "":
                self._go_back()
                self._tell_length("back")
            case name, _ if name.startswith("/"):
                raise ArgumentError(f"{line.strip()}: expected a command that there is; /help names them")
            case _:
                self._answer(line)

    def _answer(self, line: str) -> None:
        start = time.perf_counter()
        cost = self.conversation.ask(line, lambda piece: print(piece, end="", flush=True), **self.how)
        seconds = time.perf_counter() - start
        print(flush=True)
        _tell(
            f"{cost.read:,} tokens read, {cost.written:,} written, {cost.written / seconds:,.1f} tokens/s, "
            f"cache {self.conversation.cache.nbytes:,} bytes"
        )

    def _go_back(self) -> None:
        if self.kept is None:
            raise ArgumentError("/back: expected a copy to go back to, and there is none; /fork keeps one")
        self.conversation.go_on_with(Copy(self.kept.said, self.kept.cache.fork()))

    def _tell_length(self, what: str) -> None:
        said = self.conversation.said
        _tell(f"{what}: {len(said.turns)} turns, {len(said.tokens):,} tokens")


def _tell(text: str) -> None:
    print(f"[{text}]" if "\n" not in text else text, file=sys.stderr, flush=True)
