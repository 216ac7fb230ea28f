"""Chat templates of checkpoints, which turn the messages of a conversation into one text."""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FileFormatError
from ..files import read_file
from .documents import read_object
from .folder import Folder
from .limits import MAX_SOURCE_CHARACTERS, MAX_TEMPLATES
from .special_tokens import TOKENIZER_CONFIG
from .template_program import Program

Message = Mapping[str, Any]
"""A message: `{"role": "user", "content": "Hello"}`, and other keys that the template supports."""

TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"

DEFAULT, TOOL_USE = "default", "tool_use"

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The keys of a message from which templates read its reasoning."""


class ChatTemplate:
    """The chat template of a checkpoint, or several by name. Templates are untrusted programs: they run in a sandbox.

    Args:
        source: the template, or several by name: "tool_use" is used if there are tools, else "default".
        special_tokens: the tokens that a template can use, such as `bos_token`, each as text.
        origin: the file of the template, or one file for each name.

    Raises FileFormatError, with the file, for a template that cannot be parsed or is too long.
    """

    def __init__(
        self, source: str | Mapping[str, str], special_tokens: Mapping[str, str], origin: object | Mapping[str, object]
    ) -> None:
        self._special_tokens = dict(special_tokens)
        named = {DEFAULT: source} if isinstance(source, str) else source
        where = ", ".join(map(str, origin.values())) if isinstance(origin, Mapping) else origin
        length = sum(map(len, named.values()))
        if len(named) > MAX_TEMPLATES or length > MAX_SOURCE_CHARACTERS:
            raise FileFormatError(
                f"{where}: expected at most {MAX_TEMPLATES} chat templates of {MAX_SOURCE_CHARACTERS:,} characters "
                f"in total, got {len(named):,} of {length:,}"
            )
        self._origins = {name: origin[name] if isinstance(origin, Mapping) else origin for name in named}
        self._programs = {name: _program(text, self._origins[name]) for name, text in named.items()}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: at least one. Entries of a message that are None are left out. The reasoning of a message is
                given under each of the keys that templates read.
            tools: JSON schemas of the functions that the model can call.
            documents: documents that the model can use.
            add_generation_prompt: True adds the beginning of the assistant's next answer.

        Raises ArgumentError for other arguments, and, with the file of the template, for a conversation that the
        template refuses, or that needs too much time or memory.
        """
        name = TOOL_USE if tools is not None and TOOL_USE in self._programs else DEFAULT
        if name not in self._programs:
            files = ", ".join(sorted({str(origin) for origin in self._origins.values()}))
            raise ArgumentError(
                f"messages: expected plain text, as none of the chat templates {sorted(self._programs)} in {files} is "
                f"the {DEFAULT}; use encode()"
            )
        conversation = [_with_reasoning(each) for each in _objects("messages", messages)]
        if not conversation:
            raise ArgumentError("messages: expected at least one message, got none")
        given = {
            "messages": conversation,
            "tools": None if tools is None else _objects("tools", tools),
            "documents": None if documents is None else _objects("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._programs[name].run(self._special_tokens | given)
        except Exception as error:  # an untrusted program can raise anything
            raise ArgumentError(
                f"messages: expected a conversation that the chat template in {self._origins[name]} accepts; the "
                f"template raised: {str(error) or type(error).__name__}"
            ) from error


def _program(source: str, origin: object) -> Program:
    try:
        return Program(source)
    except Exception as error:  # errors of the parser, and of Python's compiler for deep nesting
        raise FileFormatError(
            f"{origin}: expected a chat template; it could not be read: {str(error) or type(error).__name__}"
        ) from error


def _objects(name: str, values: object) -> list[dict[str, Any]]:
    """Mappings as plain dicts. Raises ArgumentError, with the argument's name, for other values."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ArgumentError(f"{name}: expected a list of mappings, got {reprlib.repr(values)}")
    for value in values:
        if name == "tools" and callable(value):
            raise ArgumentError(
                f"tools: expected JSON schemas, as mappings, got the function {value!r}; describe it by a schema"
            )
        if not isinstance(value, Mapping):
            raise ArgumentError(f"{name}: expected a list of mappings, got {reprlib.repr(value)} in it")
    try:
        return [_plain(name, value) for value in values]
    except RecursionError as error:
        raise ArgumentError(f"{name}: expected mappings and lists, got values that are nested too deeply") from error


def _plain(name: str, value: object) -> Any:
    """The value in built-in types only, because a template can call the methods of its values."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(name, key): _plain(name, each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(name, each) for each in value]
    if isinstance(value, tuple):
        return tuple(_plain(name, each) for each in value)
    raise ArgumentError(f"{name}: expected text, numbers, lists and mappings, got a {type(value).__name__}")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def load_chat_template(folder: Folder, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The chat templates of a checkpoint; None if there are none.

    They are chat_template.jinja and additional_chat_templates/*.jinja, else those of tokenizer_config.json. Raises
    FileFormatError, with the file, for an invalid template.
    """
    single, several = folder.find(TEMPLATE), folder.find_all(TEMPLATES, ".jinja")
    files = ({} if single is None else {DEFAULT: single}) | {file.name.removesuffix(".jinja"): file for file in several}
    if files:
        return ChatTemplate({name: _text(file) for name, file in files.items()}, special_tokens, files)
    file = folder.find(TOKENIZER_CONFIG)
    value = None if file is None else read_object(file).get("chat_template")
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        value = {
            each.get("name") if isinstance(each.get("name"), str) else None: each.get("template") for each in value
        }
    if isinstance(value, str):
        value = {DEFAULT: value}
    if isinstance(value, Mapping) and all(isinstance(part, str) for pair in value.items() for part in pair):
        return ChatTemplate(value, special_tokens, file) if value else None
    if not value:
        return None
    raise FileFormatError(
        f"{file}, chat_template: expected a text, or a list of objects with name and template, "
        f"got {reprlib.repr(value)}"
    )


def _text(file: Path) -> str:
    try:
        return read_file(file, 4 * MAX_SOURCE_CHARACTERS).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{file}: expected a chat template in UTF-8; it could not be read: {error}") from error
