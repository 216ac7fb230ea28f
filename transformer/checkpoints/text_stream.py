"""Incremental decoding of tokens, some of which are only part of a character."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from ..errors import ArgumentError, shown
from ..generation.stops import UNFINISHED


class TextStream(ABC):
    """Incremental decoder. A character of several tokens is given with its last token."""

    @abstractmethod
    def give(self, token: int) -> str:
        """The new text that is final after this token; often a word, sometimes empty."""

    @abstractmethod
    def rest(self) -> str:
        """The remaining text after the last token; incomplete characters are replaced."""


class ByteStream(TextStream):
    """Incremental decoder of tokens that are bytes of UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def give(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


class PieceStream(TextStream):
    """Decodes each token together with the tokens before it, because its text can depend on them."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._given = 0  # number of these tokens whose text was given

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
        before = self._decode(self._tokens[: self._given])
        return self._decode(self._tokens)[len(before) :]


class CleanStream(TextStream):
    """Incremental `clean_up`: a word is given when the next word begins."""

    def __init__(self, pieces: TextStream) -> None:
        self._pieces = pieces
        self._pending = ""

    def give(self, token: int) -> str:
        self._pending += self._pieces.give(token)
        # The text is cut at a space that is inside of no pattern of `clean_up`.
        cut = next((i for i in range(len(self._pending) - 1, 0, -1) if self._is_safe(i)), 0)
        given, self._pending = self._pending[:cut], self._pending[cut:]
        return clean_up(given)

    def rest(self) -> str:
        given, self._pending = self._pending + self._pieces.rest(), ""
        return clean_up(given)

    def _is_safe(self, i: int) -> bool:
        return self._pending[i] == " " and self._pending[i - 1] not in " 'n"


class StopStream(TextStream):
    """Incremental decoder up to the first of some stop strings, which it does not give.

    Text that may be the beginning of a stop string is held back until the next tokens decide.
    """

    def __init__(self, pieces: TextStream, stop_strings: Sequence[str]) -> None:
        self._pieces = pieces
        self._stops = stop_strings
        self._pending = ""
        self._stopped = False

    def give(self, token: int) -> str:
        return self._until_stop(self._pieces.give(token))

    def rest(self) -> str:
        given = self._until_stop(self._pieces.rest())
        left, self._pending = self._pending, ""
        return given + left

    def _until_stop(self, piece: str) -> str:
        if self._stopped:
            return ""
        text = self._pending + piece
        begins = [text.index(each) for each in self._stops if each in text]
        if begins:
            self._stopped, self._pending = True, ""
            return text[: min(begins)]
        longest = max(map(len, self._stops)) - 1
        held = next((size for size in range(min(longest, len(text)), 0, -1) if self._may_stop(text[-size:])), 0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]

    def _may_stop(self, end: str) -> bool:
        return any(each.startswith(end) for each in self._stops)


def until_stop(pieces: TextStream, stop_strings: str | Sequence[str]) -> TextStream:
    """The stream, up to the first of the stop strings. Raises ArgumentError for an empty one."""
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    if not all(stops):
        raise ArgumentError(f"stop_strings: expected texts of at least one character, got {shown(stop_strings)}")
    return StopStream(pieces, stops) if stops else pieces


def clean_up(text: str) -> str:
    """The text without spaces before punctuation and before English contractions."""
    for each in (" .", " ?", " !", " ,"):
        text = text.replace(each, each[1:])
    text = text.replace(" ' ", "'")
    for each in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(each, each[1:])
    return text
