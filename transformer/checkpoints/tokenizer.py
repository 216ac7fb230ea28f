"""Text to tokens and back: what tokenizer.json says, or bytes as they are."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FileFormatError
from ..extras import missing
from .chat_template import ChatTemplate, Message
from .documents import Keys, read_object
from .folder import CONFIG, Folder, find_folder

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What an unfinished character is decoded to."""


class TextStream(ABC):
    """The text of tokens that come one by one; a character of several tokens comes whole, with its last one."""

    @abstractmethod
    def give(self, token: int) -> str:
        """The text that is certain now, and was not given yet; often a word, sometimes nothing."""

    @abstractmethod
    def rest(self) -> str:
        """What is left when no more tokens come: characters that were never finished, as replacements."""


class Tokenizer(ABC):
    """What a checkpoint makes of text.

    `stop_tokens` are those that end an answer; `template` is how a chat is written, None where the model has none.
    """

    stop_tokens: tuple[int, ...] = ()
    template: ChatTemplate | None = None

    @abstractmethod
    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """The tokens of a text, with what the model expects around one where it `begins` here."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""

    @abstractmethod
    def stream(self) -> TextStream:
        """A new text, to be decoded token by token."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the next answer begins, by the model's chat template.

        Raises ArgumentError where there is none, or it refuses the messages.
        """
        if self.template is None:
            raise ArgumentError("messages: expected plain text, as this model has no chat template; encode() it")
        return self.encode(self.template.render(messages), begins=False)


def load_tokenizer(path_or_name: str | PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint: of its tokenizer.json (extra `checkpoints`), or bytes for a model of 256 tokens.

    The chat template is that of chat_template.jinja or tokenizer_config.json, and the stop token the latter's.

    Raises FileNotFoundError where there is no such checkpoint, FileFormatError, naming the file, for files that are not
    as expected, or no tokenizer.json where the tokens are not bytes.
    """
    names = [TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, CONFIG]
    folder = find_folder(path_or_name, names)
    file = folder.find(TOKENIZER)
    if file is not None:
        return _TextTokenizer(_backend(file), *_chat(folder))
    config = folder.get(CONFIG)
    vocabulary = Keys(read_object(config), config).whole("vocab_size")
    if vocabulary != 256:
        raise FileFormatError(
            f"{folder.path}: expected a {TOKENIZER}, since the model has {vocabulary} tokens, and not 256 as bytes "
            "would need; add the model's own"
        )
    return _ByteTokenizer()


class _ByteTokenizer(Tokenizer):
    """A token is a byte of UTF-8."""

    def encode(self, text: str, *, begins: bool = True) -> list[int]:  # noqa: ARG002 (nothing stands around bytes)
        # What came in as bytes that are no UTF-8 goes on as these bytes.
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        return _ByteStream()


class _ByteStream(TextStream):
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def give(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


class _TextTokenizer(Tokenizer):
    """A tokenizer.json, run by the package that the format comes from."""

    def __init__(self, backend: Any, template: ChatTemplate | None, stop: str | None) -> None:
        # Files may have been saved with a length for training batches, which no text is to be cut or filled to.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.template = template
        token = None if stop is None else backend.token_to_id(stop)
        self.stop_tokens = () if token is None else (token,)

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        # What came in as bytes that are no UTF-8 is no text, and stands there as replacements.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        ids: list[int] = self._backend.encode(text, add_special_tokens=begins).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        return _PieceStream(self)


class _PieceStream(TextStream):
    """Decodes the last tokens together with those before them, as how a token reads may depend on these."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = 0  # so many of these tokens are in the text that was given

    def give(self, token: int) -> str:
        self._tokens.append(token)
        piece = self._piece()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        del self._tokens[: self._given]
        self._given = len(self._tokens)
        return piece

    def rest(self) -> str:
        piece = self._piece()
        self._given = len(self._tokens)
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._tokens[: self._given])
        return self._tokenizer.decode(self._tokens)[len(before) :]


def _backend(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Backend
    except ModuleNotFoundError as error:
        raise missing("checkpoints", f"reading {TOKENIZER}", error) from error
    try:
        return Backend.from_file(str(file))
    except Exception as error:
        raise FileFormatError(f"{file}: expected a tokenizer, got a file that says: {error}") from error


def _chat(folder: Folder) -> tuple[ChatTemplate | None, str | None]:
    """The chat template and the stop token, as far as files speak of them."""
    file = folder.find(TOKENIZER_CONFIG)
    content = {} if file is None else read_object(file)
    special = {key: text for key, value in content.items() if (text := _special(key, value)) is not None}
    origin, source = file, _default_template(content.get("chat_template"))
    separate = folder.find(TEMPLATE)
    if separate is not None:
        origin, source = separate, separate.read_text(encoding="utf-8", errors="replace")
    template = None if source is None else ChatTemplate(source, special, origin)
    return template, special.get("eos_token")


def _special(key: str, value: object) -> str | None:
    """The text of a special token, which stands there by itself or in an object."""
    if not key.endswith("_token"):
        return None
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _default_template(value: object) -> str | None:
    """The one template, or of several by name the default."""
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) else None
