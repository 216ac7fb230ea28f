"""Chat templates: how the messages of a conversation become one text, as the checkpoint's own template says."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ArgumentError, FileFormatError

Message = Mapping[str, str]
"""Who speaks and what they say: `{"role": "user", "content": "Hello"}`."""


class ChatTemplate:
    """A template as checkpoints carry them, rendered in a sandbox: it is a program that somebody else has written.

    Args:
        source: the template.
        special_tokens: what it may name: `bos_token` and the like, each as text.
        origin: the file that it comes from.

    Raises FileFormatError, naming the file, for a template that cannot be read.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: object) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise FileFormatError(f"{origin}: expected a chat template, got one that says: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The text up to where the assistant's next answer begins.

        Raises ArgumentError for messages that the template refuses.
        """
        plain = [dict(message) for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=True, **self._special_tokens)
        except Exception as error:  # whatever the program of somebody else may raise
            raise ArgumentError(
                f"messages: expected a conversation that the model's chat template takes, got one of which it says: "
                f"{error}"
            ) from error


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; its text is what stands within."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The filters, functions and white space that templates of checkpoints are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own would escape what HTML gives a meaning to.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
