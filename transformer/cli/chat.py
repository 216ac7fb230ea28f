"""`python -m transformer chat`: a conversation at the terminal, in which only what is new is computed."""

import argparse
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..checkpoints import load_tokenizer
from ..checkpoints.generation_config import defaults_and_sources
from ..errors import ArgumentError, AttentionError, ConfigurationError
from ..models import DecoderOnlyTransformer
from .chat_commands import help_text, run_command
from .chat_session import ChatSession
from .conversation import Conversation
from .interrupts import Interrupts
from .lines import Entry, LineReader, open_lines, read_entry
from .options import (
    DEFAULTS,
    SAMPLING,
    add_device,
    add_model,
    add_sampling,
    flag,
    loaded,
    random_generator,
    sampling,
    size_line,
)
from .output import error_line, tell

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_to(commands: "Commands") -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chat",
        help="chat with a model",
        description="Chat with a model. Answers go to the standard output, all else to the standard error. Options of "
        "sampling are by default those of the model's generation_config.json.",
        epilog=f"in the chat:\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_device(parser)
    add_sampling(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the first message")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Answers each message of the standard input."""
    with open_lines() as read_line:
        tokenizer, recommended = load_tokenizer(options.model), _recommended(options.model)
        how = sampling(options, {name: value for name, (value, _) in recommended.items()})
        model = loaded(options)
        if not isinstance(model, DecoderOnlyTransformer):
            raise ArgumentError(f"MODEL: expected a decoder, which continues text, got a {type(model).__name__}")
        session = ChatSession(
            Conversation(model, tokenizer, options.system),
            {
                **how,
                "stop_tokens": (*model.config.stop_tokens, *tokenizer.stop_tokens),
                "generator": random_generator(options, model),
            },
        )
        tell(f"{options.model}, {size_line(model)} on {next(model.parameters()).device}")
        tell(_sampling_line(how, recommended, options))
        if tokenizer.template is None:
            tell("no chat template: the model continues the conversation as one text, a line for each message")
        tell("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat")
        interrupts = Interrupts()
        with interrupts.installed():
            _converse(session, read_line, interrupts)


def _recommended(model: str) -> dict[str, tuple[Any, str]]:
    """The sampling that the checkpoint recommends, with the source of each option; nothing, and a word, where it asks
    for what there is not."""
    try:
        found = defaults_and_sources(model)
    except ConfigurationError as error:
        tell(f"the model's own sampling is not used: {error}")
        return {}
    return {name: found[name] for name in found if name in SAMPLING}


def _sampling_line(how: dict[str, Any], recommended: dict[str, tuple[Any, str]], options: argparse.Namespace) -> str:
    """The options of the command line that are in force, and the source of those that were not given."""
    parts = []
    for name, value in how.items():
        tells = name in recommended and getattr(options, name) is None and value != DEFAULTS.get(name)
        parts.append(f"{flag(name)} {value}" + (f" ({recommended[name][1]})" if tells else ""))
    return ", ".join([*parts, f"--seed {options.seed}"])


def _converse(session: ChatSession, read_line: LineReader, interrupts: Interrupts) -> None:
    """Does what the entries say, until one ends the chat, the input ends, or Ctrl-C comes twice in a row."""
    warned = False
    with suppress(EOFError):
        while not session.ended:
            entry = _next_entry(read_line, interrupts)
            if entry is None and warned:
                return
            warned = entry is None or _is_interrupted(session, entry, interrupts)
            if warned:
                tell("Ctrl-C again ends the chat, as do /quit and Ctrl-D")


def _next_entry(read_line: LineReader, interrupts: Interrupts) -> Entry | None:
    """None where Ctrl-C came instead, and an empty one where it could not be read whole."""
    try:
        return interrupts.run(lambda: read_entry(read_line))
    except KeyboardInterrupt:
        return None
    except ArgumentError as error:
        tell(error_line(error))
        return Entry("", is_command=False)


def _is_interrupted(session: ChatSession, entry: Entry, interrupts: Interrupts) -> bool:
    """Does what an entry says; true where Ctrl-C came in between, other than in an answer, which it ends."""
    do = run_command if entry.is_command else ChatSession.answer
    try:
        interrupts.run(lambda: do(session, entry.text))
    except KeyboardInterrupt:
        return True
    except BrokenPipeError:  # nobody reads the answers any more
        raise
    except (AttentionError, OSError) as error:
        # A mistyped name of a file is no reason to lose a conversation.
        tell(error_line(error))
    return False
