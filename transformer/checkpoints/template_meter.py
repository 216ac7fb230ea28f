"""Limits of one run of a chat template: steps, characters, seconds, and sizes of values.

A template is an untrusted program that runs in this process, and a running operation cannot be stopped. Each operation
is therefore checked before it runs: the rules below bound its result by the sizes of its operands. Values are
immutable, so the size of a list or mapping is computed once.
"""

import re
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, MappingView, Sized
from types import GeneratorType
from typing import Any

from jinja2.runtime import LoopContext

from .limits import (
    MAX_INTEGER_BITS,
    MAX_OUTPUT_CHARACTERS,
    MAX_RENDER_CHARACTERS,
    MAX_RENDER_SECONDS,
    MAX_RENDER_STEPS,
)

TEXT = (str, bytes, bytearray)
CONTAINER = (list, tuple, dict, set, frozenset)

MAX_KEPT_ELEMENTS = 1 << 20
"""Elements of all lists and mappings whose sizes are kept."""

MAX_SLOW_CHARACTERS = 1 << 14
"""Characters of the operands of the slow filters and of %, whose time grows with the square."""

MAX_FIELD_WIDTH = 1 << 16
"""Characters of one field of a format."""

MAX_DECIMALS = 300
"""Decimals of the filter `round`."""

ENCODINGS = frozenset({"utf-8", "utf8", "ascii", "latin-1", "utf-16", "utf-32", "strict", "ignore", "replace"})
"""Encodings and error handlers that are allowed. The time of some others grows with the square."""

SLOW = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr"})
"""Filters whose time grows with the square of their input."""

PADDING = frozenset({"center", "ljust", "rjust", "to_bytes", "truncate", "zfill"})
"""Functions whose result can be as long as a number that they are given."""

PER_CHARACTER = frozenset({"expandtabs", "indent", "tojson"})
"""Functions that can write a number of characters for each character of their input."""

_NUMBER = re.compile(r"\d+")


class TooMuchError(Exception):
    """The template exceeds a limit."""


class Meter:
    """Counter of the work of one run. All methods raise TooMuchError if a limit is exceeded."""

    def __init__(self) -> None:
        self._steps, self._characters = MAX_RENDER_STEPS, MAX_RENDER_CHARACTERS
        self._deadline = time.monotonic() + MAX_RENDER_SECONDS
        # The value is kept too, so that no other value gets its id.
        self._sizes: dict[int, tuple[Any, int, int]] = {}
        self._kept = 0

    def step(self, count: int = 1) -> None:
        """Counts `count` steps."""
        self._steps -= count
        if self._steps < 0:
            raise TooMuchError(f"it takes more than {MAX_RENDER_STEPS:,} steps")
        if time.monotonic() > self._deadline:
            raise TooMuchError(f"it takes more than {MAX_RENDER_SECONDS:g} seconds")

    def write(self, characters: int) -> None:
        """Counts the characters of a text."""
        self.step()
        self._characters -= characters
        if self._characters < 0:
            raise TooMuchError(f"it writes more than {MAX_RENDER_CHARACTERS:,} characters")

    def check(self, characters: int) -> None:
        """Checks the number of characters that one operation can write, before it runs."""
        self.step()
        if characters > MAX_RENDER_CHARACTERS:
            raise TooMuchError(f"one operation makes {characters:,} characters, more than {MAX_RENDER_CHARACTERS:,}")

    def size(self, value: Any) -> tuple[int, int]:
        """The characters of a value as text, and its depth of nested lists and mappings."""
        if isinstance(value, TEXT):
            return len(value), 0
        if isinstance(value, int):
            return value.bit_length() // 3 + 1, 0
        if isinstance(value, MappingView):
            return self.size(list(value))  # type: ignore[call-overload]  # all views can be iterated
        if not isinstance(value, CONTAINER):
            return 24, 0
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1], known[2]
        self.step(1 + len(value) // 2)
        characters, depth = 2 + 2 * len(value), 0
        parts: Iterable[Any] = (*value.keys(), *value.values()) if isinstance(value, dict) else value
        for part in parts:
            more, deep = self.size(part)
            characters, depth = characters + more, max(depth, deep)
        if characters > MAX_OUTPUT_CHARACTERS:
            raise TooMuchError(f"a list or mapping holds more than {MAX_OUTPUT_CHARACTERS:,} characters")
        if self._kept > MAX_KEPT_ELEMENTS:
            self._sizes.clear()
            self._kept = 0
        self._kept += len(value) + 1
        self._sizes[id(value)] = value, characters, depth + 1
        return characters, depth + 1

    def count_result(self, value: Any) -> Any:
        """Counts the result of an operation; the values of a generator are counted one at a time."""
        if isinstance(value, TEXT):
            self.write(len(value))
        elif isinstance(value, CONTAINER):
            self.size(value)
            self.step(1 + len(value) // 16)
        elif isinstance(value, GeneratorType):
            return self._one_by_one(value)
        elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise TooMuchError(f"it makes an integer of more than {MAX_INTEGER_BITS:,} bits")
        else:
            self.step()
        return value

    def count_output(self, value: Any) -> Any:
        """Counts a value that is written as text."""
        self.write(self.size(value)[0])
        return value

    def count_loop(self, values: Any) -> Any:
        """Counts the iterations of a loop over `values`."""
        self.step(1 + (len(values) if isinstance(values, Sized) else 0))
        return values

    def count_compare(self, value: Any) -> Any:
        """Counts a comparison of a value."""
        self.step()
        return value

    def count_literal(self, characters: int) -> str:
        """Counts characters of the template's own text; gives an empty text."""
        self.write(characters)
        return ""

    def operator(self, name: str, left: Any, right: Any) -> None:
        """Checks an operator before it is applied."""
        self.step()
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            result = {"*": sum(bits), "**": bits[0] * max(right, 1)}.get(name, max(bits))
            if max(*bits, result) > MAX_INTEGER_BITS:
                raise TooMuchError(f"{name} makes an integer of more than {MAX_INTEGER_BITS:,} bits")
        elif name == "*":
            count, repeated = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and isinstance(repeated, TEXT):
                self.check(len(repeated) * count)
            elif isinstance(count, int) and isinstance(repeated, CONTAINER):
                self.step(max(0, len(repeated) * count))
        elif name == "%" and isinstance(left, TEXT):
            self.printf(left, right)

    def function(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Checks a method or filter before it is called with a value."""
        self.step()
        rest = (*args, *kwargs.values())
        numbers = sum(abs(each) for each in rest if isinstance(each, int))
        first = rest[0] if rest else ""
        texts = sum(len(each) for each in rest if isinstance(each, TEXT))
        if name in SLOW:
            if self.size(value)[0] + numbers + texts > MAX_SLOW_CHARACTERS:
                raise TooMuchError(f"{name} is given more than {MAX_SLOW_CHARACTERS:,} characters")
        elif name in ("encode", "decode") and not ENCODINGS.issuperset(str(each).lower() for each in rest):
            raise TooMuchError(f"{name} knows {', '.join(sorted(ENCODINGS))} and no other encodings")
        elif name in PADDING:
            self.check(_length(value) + numbers + texts)
        elif name in PER_CHARACTER:
            characters, depth = self.size(value)
            self.check((1 + characters) * (1 + (numbers + self.size(rest)[0]) * (1 + depth)))
        elif name == "replace" and len(rest) > 1:
            characters = self.size(value)[0]
            self.check(characters + (1 + characters // max(1, _length(first))) * self.size(rest[1])[0])
        elif name == "join":
            self.check(self.size(value)[0] + self.size(rest)[0] + _length(value) * _length(first))
        elif name == "format" and isinstance(value, TEXT):
            self.printf(value, kwargs or args)
        elif name in ("batch", "slice"):
            self.step(numbers)
        elif name == "sum":
            if any(isinstance(each, CONTAINER) for each in rest):
                self.check(_length(value) * (self.size(value)[0] + self.size(rest)[0]))
        elif name == "round":
            if numbers > MAX_DECIMALS:
                raise TooMuchError(f"{name} is given more than {MAX_DECIMALS} decimals")
        elif isinstance(value, TEXT):
            self.check((1 + len(value)) * (1 + texts + self.size([x for x in rest if isinstance(x, CONTAINER)])[0]))
        else:
            self.check((1 + _length(value)) * (1 + texts))

    def field(self, specification: str) -> None:
        """Checks a field of a format by its specification, before it is formatted."""
        self.step()
        if any(len(number) > 5 or int(number) > MAX_FIELD_WIDTH for number in _NUMBER.findall(specification)):
            raise TooMuchError(f"a field is wider than {MAX_FIELD_WIDTH:,} characters")

    def fields(self, form: str, values: Any) -> None:
        """Checks a format with fields in braces before it is formatted with `values`."""
        self.check(len(form) + form.count("{") * self.size(values)[0])

    def printf(self, form: Any, values: Any) -> None:
        """Checks a format with fields after percent signs before it is formatted with `values`."""
        if len(form) > MAX_SLOW_CHARACTERS:
            raise TooMuchError(f"% formats a text of more than {MAX_SLOW_CHARACTERS:,} characters")
        text = form if isinstance(form, str) else form.decode("latin-1")
        # All numbers count as widths: keys in parentheses can contain any text, so no pattern finds only the widths.
        self.field(text)
        if "*" in text and isinstance(values, tuple):
            self.field(" ".join(str(value) for value in values if isinstance(value, int)))
        times = text.count("%") if isinstance(values, Mapping) else 1
        self.check(len(text) + times * self.size(values)[0])

    def _one_by_one(self, values: Generator[Any, Any, Any]) -> Generator[Any, None, None]:
        for value in values:
            self.step()
            yield value


def as_list(value: Any) -> Any:
    """A list of the values of an iterator, so that its size is known; other values unchanged."""
    return list(value) if isinstance(value, Iterator) and not isinstance(value, LoopContext) else value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 1
