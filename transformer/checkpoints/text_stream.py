"""Text of tokens that come one by one, of which some are a part of a character."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

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


class ByteStream(TextStream):
    """A token is a byte of UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def give(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


class PieceStream(TextStream):
    """Decodes the last tokens together with those before them, as how a token reads may depend on these."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
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
        before = self._decode(self._tokens[: self._given])
        return self._decode(self._tokens)[len(before) :]


class CleanStream(TextStream):
    """Takes spaces out as `clean_up` does, of text that comes in pieces: a word is given once the next one begins."""

    def __init__(self, pieces: TextStream) -> None:
        self._pieces = pieces
        self._held = ""

    def give(self, token: int) -> str:
        self._held += self._pieces.give(token)
        # No pattern reaches over a space after a character that no pattern has before one.
        cut = next((i for i in range(len(self._held) - 1, 0, -1) if self._is_safe(i)), 0)
        given, self._held = self._held[:cut], self._held[cut:]
        return clean_up(given)

    def rest(self) -> str:
        given, self._held = self._held + self._pieces.rest(), ""
        return clean_up(given)

    def _is_safe(self, i: int) -> bool:
        return self._held[i] == " " and self._held[i - 1] not in " 'n"


def clean_up(text: str) -> str:
    """Takes out the spaces that English has none of: before punctuation and contractions."""
    for each in (" .", " ?", " !", " ,"):
        text = text.replace(each, each[1:])
    text = text.replace(" ' ", "'")
    for each in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(each, each[1:])
    return text
