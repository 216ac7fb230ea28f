"""Tokenizers of checkpoints: by tokenizer.json, or one token per byte."""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, FileFormatError
from ..extras import missing
from ..files import read_file
from .chat_template import TEMPLATE, TEMPLATES, ChatTemplate, Message, load_chat_template
from .documents import Keys, read_object
from .folder import CONFIG, Folder, find_folder
from .limits import MAX_FILE_BYTES, MAX_TOKEN_CHARACTERS
from .special_tokens import ADDED_TOKENS, FLAGS, SPECIAL_TOKENS, TOKENIZER_CONFIG, AddedToken, read_special_tokens
from .text_batch import checked_texts, encoded, padded
from .text_stream import ByteStream, CleanStream, PieceStream, TextStream, clean_up, until_stop
from .tokenizer_rules import check_rules

TOKENIZER = "tokenizer.json"

TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, TEMPLATE, f"{TEMPLATES}/*.jinja", CONFIG)
"""Files that are fetched from the Hub."""


class Tokenizer(ABC):
    """Tokenizer of a checkpoint.

    `stop_tokens`: tokens that end an answer. `template`: the chat template; None if the model has none.
    """

    stop_tokens: tuple[int, ...] = ()
    template: ChatTemplate | None = None

    @abstractmethod
    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """The tokens of a text; `begins=True` adds the special tokens that the model expects around a text.

        Raises ArgumentError if `text` is not a str, and FileFormatError, with the file, if the tokenizer fails.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens.

        Raises ArgumentError for invalid ids, and FileFormatError, with the file, if the tokenizer fails.
        """

    @abstractmethod
    def stream(self, stop_strings: str | Sequence[str] = ()) -> TextStream:
        """A new incremental decoder, up to the first of the stop strings, which is not given.

        Raises ArgumentError for an empty one.
        """

    def encode_batch(self, texts: Sequence[str], *, max_length: int | None = None) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, L] of several texts, with special tokens, and their mask [B, L]: padded on the right.

        Texts are cut to `max_length` tokens, of which special tokens around a text stay.

        Raises ArgumentError if `texts` are not several str, or `max_length` is no room for special tokens.
        """
        return padded([encoded(self.encode, text, max_length) for text in checked_texts(texts)])

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The tokens of a conversation up to the next answer, by the model's chat template.

        The arguments are those of `ChatTemplate.render`. Raises ArgumentError if the model has no chat template, or if
        it refuses the messages.
        """
        if self.template is None:
            raise ArgumentError("messages: expected plain text, as this model has no chat template; use encode()")
        text = self.template.render(
            messages, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt
        )
        return self.encode(text, begins=False)


def load_tokenizer(path_or_name: str | PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: by tokenizer.json (extra `checkpoints`), or bytes for a model with 256 tokens.

    Special tokens, added tokens and chat templates are those that transformers reads from the folder.

    Raises FileNotFoundError if there is no such checkpoint, and FileFormatError, with the file, for invalid files and
    for a missing tokenizer.json of a model whose tokens are not bytes.
    """
    folder = find_folder(path_or_name, TOKENIZER_FILES, revision=revision)
    file = folder.find(TOKENIZER)
    if file is not None:
        tokenizer = _TextTokenizer(file, folder)
        tokenizer.template = load_chat_template(folder, tokenizer.named)
        return tokenizer
    config = folder.get(CONFIG)
    content = read_object(config)
    vocabulary = Keys(content, config).whole("vocab_size")
    if vocabulary != 256:
        remedy = f"add the {TOKENIZER} of the model"
        if content.get("model_type") == "marian":
            remedy += (
                ", or give the model ids of transformers.MarianTokenizer; two models of sentencepiece (source.spm, "
                "target.spm) are not read"
            )
        raise FileFormatError(
            f"{folder.path}: expected a {TOKENIZER}, since the model has {vocabulary} tokens and not 256, one per "
            f"byte; {remedy}"
        )
    return _ByteTokenizer()


class _ByteTokenizer(Tokenizer):
    """Tokenizer with one token per byte of UTF-8."""

    def encode(self, text: str, *, begins: bool = True) -> list[int]:  # noqa: ARG002 (no special tokens)
        # Surrogate escapes are bytes that were not UTF-8; they become these bytes again.
        return list(_checked(text).encode("utf-8", "surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(_ids(tokens, 256)).decode("utf-8", "replace")

    def stream(self, stop_strings: str | Sequence[str] = ()) -> TextStream:
        return until_stop(ByteStream(), stop_strings)


class _TextTokenizer(Tokenizer):
    """Tokenizer of a tokenizer.json, run by the package `tokenizers`."""

    def __init__(self, file: Path, folder: Folder) -> None:
        self._file = file
        self._backend = backend = _backend(file)
        padding = backend.padding or {}
        # A file can have been saved with truncation or padding for training.
        backend.no_truncation()
        backend.no_padding()
        # BPE dropout is for training.
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        present = {
            number: AddedToken(token.content, {flag: getattr(token, flag) for flag in FLAGS})
            for number, token in backend.get_added_tokens_decoder().items()
        }
        special = read_special_tokens(folder, present, padding.get("pad_token"))
        self.named = special.named
        with _failures(file):
            backend.add_tokens([_import_tokenizers().AddedToken(each.content, **each.flags) for each in special.added])
            check_rules(file, backend.normalizer, backend.pre_tokenizer)
            check_rules(file, backend.decoder)
            longest = max(backend.get_vocab(), key=len, default="")
            backend.encode_special_tokens = special.split
        if len(longest) > MAX_TOKEN_CHARACTERS:
            raise FileFormatError(
                f"{file}: expected tokens of at most {MAX_TOKEN_CHARACTERS:,} characters, got a token of "
                f"{len(longest):,}"
            )
        is_bpe = type(backend.model).__name__ == "BPE"
        self._cleans_up = special.clean_up and (special.clean_up_bpe or not is_bpe)
        stop = backend.token_to_id(special.named["eos_token"]) if "eos_token" in special.named else None
        self.stop_tokens = () if stop is None else (stop,)

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        # Surrogate escapes are bytes that were not UTF-8; they are replaced.
        text = _checked(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        with _failures(self._file):
            ids: list[int] = self._backend.encode(text, add_special_tokens=begins).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text = self._decode(tokens)
        return clean_up(text) if self._cleans_up else text

    def _decode(self, tokens: Sequence[int]) -> str:
        ids = _ids(tokens, 1 << 32)
        with _failures(self._file):
            text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def stream(self, stop_strings: str | Sequence[str] = ()) -> TextStream:
        pieces = PieceStream(self._decode)
        return until_stop(CleanStream(pieces) if self._cleans_up else pieces, stop_strings)


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise missing("checkpoints", f"reading {TOKENIZER}", error) from error
    return tokenizers


def _backend(file: Path) -> Any:
    backend = _import_tokenizers().Tokenizer
    content = read_file(file, MAX_FILE_BYTES)
    with _failures(file):
        return backend.from_buffer(content)


@contextmanager
def _failures(file: Path) -> Iterator[None]:
    """Turns errors and panics of the package `tokenizers` into a FileFormatError with the file."""
    try:
        yield
    except FileFormatError:
        raise
    except BaseException as error:
        # A panic of Rust is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FileFormatError(f"{file}: expected a tokenizer; it could not be read or run: {error}") from error


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise ArgumentError(f"text: expected a str, got a {type(text).__name__}")
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # Surrogates: a pair becomes one character, others are replaced.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _ids(tokens: Sequence[int], below: int) -> list[int]:
    try:
        ids = list(map(index, tokens))
    except TypeError:
        ids = [-1]
    if not all(0 <= token < below for token in ids):
        raise ArgumentError(f"tokens: expected a list of ids (int) from 0 to {below - 1}, got {reprlib.repr(tokens)}")
    return ids
