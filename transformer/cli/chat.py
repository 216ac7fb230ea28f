"""Command `chat`: a conversation at the terminal, in which only new tokens are computed."""

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
    stops,
)
from .output import error_line, notify

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

WITHOUT_FLAGS = (
    "typical_p",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "min_new_tokens",
    "max_time",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
"""Options that a checkpoint may recommend, and the command line has no flags for."""

BEAMS = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")
"""Options of several candidates, which an answer that is shown as it is written cannot have."""


def add_to(commands: "Commands") -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chat",
        help="chat with a model",
        description="Chat with a model. Answers go to the standard output, all other text to the standard error. The "
        "defaults of sampling are those of the model's generation_config.json.",
        epilog=f"in the chat:\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_device(parser)
    add_sampling(parser)
    parser.add_argument("--system", metavar="TEXT", help="system text, which the model reads before the first message")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the chat: answers each message of the standard input."""
    with open_lines() as read_line:
        tokenizer, recommended = load_tokenizer(options.model), _recommended(options.model)
        chosen = sampling(options, {name: value for name, (value, _) in recommended.items()})
        model = loaded(options)
        if not isinstance(model, DecoderOnlyTransformer):
            raise ArgumentError(f"MODEL: expected a decoder-only model, got {type(model).__name__}")
        session = ChatSession(
            Conversation(model, tokenizer, options.system),
            {
                **chosen,
                **stops(options, model, tokenizer),
                "generator": random_generator(options, model),
            },
        )
        notify(f"{options.model}, {size_line(model)} on {next(model.parameters()).device}")
        notify(_sampling_line(chosen, recommended, options))
        if tokenizer.template is None:
            notify("no chat template: the model continues the conversation as one text, a line for each message")
        notify("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat")
        interrupts = Interrupts()
        with interrupts.installed():
            _run_chat(session, read_line, interrupts)


def _recommended(model: str) -> dict[str, tuple[Any, str]]:
    """The sampling options of the checkpoint, with the source of each; none, with a notice, if they are unsupported."""
    try:
        found = defaults_and_sources(model)
    except ConfigurationError as error:
        notify(f"the model's own sampling is not used: {error}")
        return {}
    unused = ", ".join(f"{name} {found[name][0]}" for name in BEAMS if name in found)
    if unused:
        notify(f"recommended by the model, and not used, as answers are shown while they are written: {unused}")
    return {name: found[name] for name in found if name in SAMPLING or name in WITHOUT_FLAGS}


def _sampling_line(chosen: dict[str, Any], recommended: dict[str, tuple[Any, str]], options: argparse.Namespace) -> str:
    """The active options as on the command line, with the source of each that was not given there."""
    parts = []
    for name, value in chosen.items():
        has_source = name in recommended and getattr(options, name, None) is None and value != DEFAULTS.get(name)
        shown = name if name in WITHOUT_FLAGS else flag(name)
        parts.append(f"{shown} {value}" + (f" ({recommended[name][1]})" if has_source else ""))
    return ", ".join([*parts, f"--seed {options.seed}"])


def _run_chat(session: ChatSession, read_line: LineReader, interrupts: Interrupts) -> None:
    """Runs all entries, until one ends the chat, the input ends, or Ctrl-C is pressed twice in a row."""
    warned = False
    with suppress(EOFError):
        while not session.ended:
            entry = _next_entry(read_line, interrupts)
            if entry is None and warned:
                return
            warned = entry is None or _is_interrupted(session, entry, interrupts)
            if warned:
                notify("Ctrl-C again ends the chat, as do /quit and Ctrl-D")


def _next_entry(read_line: LineReader, interrupts: Interrupts) -> Entry | None:
    """The next entry; None after Ctrl-C; an empty entry, with a notice, if it was incomplete."""
    try:
        return interrupts.run(lambda: read_entry(read_line))
    except KeyboardInterrupt:
        return None
    except ArgumentError as error:
        notify(error_line(error))
        return Entry("", is_command=False)


def _is_interrupted(session: ChatSession, entry: Entry, interrupts: Interrupts) -> bool:
    """Runs an entry; True if Ctrl-C interrupted it. In an answer, Ctrl-C only ends the answer."""
    run_entry = run_command if entry.is_command else ChatSession.answer
    try:
        interrupts.run(lambda: run_entry(session, entry.text))
    except KeyboardInterrupt:
        return True
    except BrokenPipeError:  # the reader of the output has closed it
        raise
    except (AttentionError, OSError) as error:
        # An error such as a wrong file name must not end the conversation.
        notify(error_line(error))
    return False
