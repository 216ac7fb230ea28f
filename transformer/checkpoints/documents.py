"""JSON files of a checkpoint, read key by key, with errors that name the key and the file."""

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigurationError, FileFormatError
from ..files import read_file
from .limits import MAX_COUNT, MAX_JSON_BYTES, MAX_LISTED_NAMES

Value = TypeVar("Value")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a UTF-8 file. Raises FileFormatError, with the file, for other content."""
    content = _read_json(file, "a JSON object")
    if not isinstance(content, dict):
        raise FileFormatError(f"{file}: expected a JSON object, got {reprlib.repr(content)}")
    return content


def read_objects(file: Path) -> list[dict[str, Any]]:
    """The JSON list of objects in a UTF-8 file. Raises FileFormatError, with the file, for other content."""
    content = _read_json(file, "a JSON list of objects")
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise FileFormatError(f"{file}: expected a JSON list of objects, got {reprlib.repr(content)}")
    return content


def _read_json(file: Path, expected: str) -> Any:
    content = read_file(file, MAX_JSON_BYTES)
    try:
        return json.loads(content.decode())
    except RecursionError as error:
        raise FileFormatError(f"{file}: expected {expected}; it is nested too deeply") from error
    except ValueError as error:
        raise FileFormatError(f"{file}: expected {expected}; it could not be read: {error}") from error


def listed(names: Iterable[str], most: int = MAX_LISTED_NAMES) -> str:
    """The first `most` names, sorted, for an error message, and the number of the others."""
    ordered = sorted(names)
    more = len(ordered) - most
    return ", ".join(each[:200] for each in ordered[:most]) + (f" and {more:,} more" if more > 0 else "")


class Keys:
    """Typed access to the keys of an object in a file.

    A key that is missing or null gives the default, and is refused if there is none. `length` is the maximum row length
    that the caller asked for; some options depend on it. All methods raise ConfigurationError.
    """

    def __init__(self, content: Mapping[str, Any], file: Path, within: str = "", length: int | None = None) -> None:
        self.file = file
        self.length = length
        self._content = content
        self.within = within

    def __contains__(self, key: str) -> bool:
        """True if the key has a value other than null."""
        return self._content.get(key) is not None

    def with_length(self, length: int) -> "Keys":
        """The same object, with a `length` for callers that asked for none."""
        return Keys(self._content, self.file, self.within, self.length or length)

    def with_default(self, key: str, value: object) -> "Keys":
        """The same object, with this value at a key that has none."""
        return self if key in self else Keys({**self._content, key: value}, self.file, self.within, self.length)

    @property
    def given(self) -> list[str]:
        """All keys of the object, also those without a value."""
        return list(self._content)

    def missing(self, key: str, default: Value | None) -> Value | None:
        """The meaning of a key without a value, if null means "none": None for null, the default for a missing key."""
        return None if key in self._content else default

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_COUNT) -> int:
        """A whole number from `least` to `most`."""
        value = self._value(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.refusal(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False, text: bool = False) -> float:
        """A finite number above 0; with `zero`, also 0; with `text`, also written as a text."""
        value = self._value(key, default)
        if text and isinstance(value, str):
            value = _number_in(value)
        expected = "a finite number of at least 0" if zero else "a finite number above 0"
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1.0
        if not 0 <= number < math.inf or (number == 0 and not zero):
            raise self.refusal(key, expected)
        try:
            return float(number)
        except OverflowError as error:
            raise self.refusal(key, expected) from error

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """A text."""
        value = self._value(key, None)
        if not isinstance(value, str):
            raise self.refusal(key, "a text")
        return value

    def word(self, key: str, words: Mapping[str, Value], default: str | None = None) -> Value:
        """The value of a known word."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in words:
            raise self.refusal(key, f"one of {sorted(words)}")
        return words[value]

    def words(self, key: str, known: Mapping[str, Value], number: int) -> list[Value]:
        """The values of a list of `number` known words."""
        value = self._value(key, None)
        if not isinstance(value, list) or len(value) != number:
            raise self.refusal(key, f"a list of {number} words")
        if not all(isinstance(word, str) and word in known for word in value):
            raise self.refusal(key, f"words among {sorted(known)}")
        return [known[word] for word in value]

    def names(self, key: str) -> list[str]:
        """A list of names; empty if the key has no value."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.refusal(key, "a list of names")
        return value

    def numbers(self, key: str) -> list[float]:
        """A list of finite numbers above 0."""
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self.refusal(key, "a list of numbers")
        return [Keys({key: each}, self.file, self.within).number(key) for each in value]

    def wholes(self, key: str) -> list[int]:
        """A list of whole numbers of at least 0."""
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self.refusal(key, "a list of whole numbers")
        return [Keys({key: each}, self.file, self.within).whole(key, least=0) for each in value]

    def tokens(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or none; a negative id means none. An id may be written as 5.0."""
        value = self._content.get(key)
        ids = [as_int(each) for each in (value if isinstance(value, list) else [] if value is None else [value])]
        if any(type(token) is not int for token in ids):
            raise self.refusal(key, "a token id or a list of them")
        return tuple(token for token in ids if token >= 0)

    def inner(self, key: str) -> "Keys":
        """The object at a key; empty if the key has no value."""
        value = self._content.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(key, "an object")
        return Keys(value or {}, self.file, f"{self.within}{key}.", self.length)

    def objects(self, key: str, number: int) -> list["Keys"]:
        """The objects of a list of `number` objects."""
        value = self._value(key, None)
        if not isinstance(value, list) or len(value) != number or not all(isinstance(each, dict) for each in value):
            raise self.refusal(key, f"a list of {number} objects")
        names = (f"{self.within}{key}[{index}]." for index in range(number))
        return [Keys(each, self.file, name, self.length) for each, name in zip(value, names, strict=True)]

    def inner_of_all(self, kinds: Iterable[str]) -> "Keys":
        """The one object at all of these keys that have a value; this object if none has."""
        present = [kind for kind in kinds if kind in self]
        for kind in present[1:]:
            if not self.is_value(kind, self._content[present[0]]):
                raise self.refusal(kind, f"the value of {self.within}{present[0]}, as all layers share one value")
        return self.inner(present[0]) if present else self

    def is_empty(self, key: str) -> bool:
        """True if the key is missing or its value is empty."""
        return not self._content.get(key)

    def is_value(self, key: str, wanted: object) -> bool:
        """True if the key has this value, or is missing."""
        value = self._content.get(key)
        return value is None or (type(value) is type(wanted) and value == wanted)

    def refusal(self, key: str, expected: str) -> ConfigurationError:
        """The error for the value at a key."""
        return ConfigurationError(
            f"{self.file}, {self.within}{key}: expected {expected}, got {reprlib.repr(self._content.get(key))}"
        )

    def _value(self, key: str, default: object) -> Any:
        value = self._content.get(key)
        return default if value is None else value


def as_int(value: Any) -> Any:
    """A float without a fraction as an int; any other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number_in(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
