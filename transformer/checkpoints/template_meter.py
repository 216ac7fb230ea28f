"""Bounds of one run of a chat template: steps, characters, seconds, and the size of whatever it makes.

A template is a program of somebody else that works in this process, and an operation that has begun cannot be stopped.
So each is looked at before: by the rules below its result stays within a bound that is told by the sizes of what it
is given. Values cannot be changed once they are made, so what a list or mapping holds, written out, is counted once.
"""

import re
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, MappingView, Sized
from types import GeneratorType
from typing import Any

from jinja2.runtime import LoopContext

from .limits import (
    LARGEST_INTEGER,
    LARGEST_TEMPLATE_OUTPUT,
    LONGEST_RENDERING,
    MOST_TEMPLATE_CHARACTERS,
    MOST_TEMPLATE_STEPS,
)

TEXT = (str, bytes, bytearray)
CONTAINER = (list, tuple, dict, set, frozenset)

MOST_KEPT = 1 << 20
"""Elements of the lists and mappings whose sizes are kept."""

LARGEST_SLOW = 1 << 14
"""Characters that the slow filters, and %, are given: their time grows with the square."""

WIDEST_FIELD = 1 << 16
MOST_DECIMALS = 300

ENCODINGS = frozenset({"utf-8", "utf8", "ascii", "latin-1", "utf-16", "utf-32", "strict", "ignore", "replace"})
"""Of texts and bytes, and what becomes of others. Python has some whose time grows with the square."""

SLOW = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr"})
PADDING = frozenset({"center", "ljust", "rjust", "to_bytes", "truncate", "zfill"})
PER_CHARACTER = frozenset({"expandtabs", "indent", "tojson"})

_NUMBER = re.compile(r"\d+")


class TooMuchError(Exception):
    """The template asks for more than a conversation needs."""


class Meter:
    """Counts what one run does. All methods raise TooMuchError."""

    def __init__(self) -> None:
        self._steps, self._characters = MOST_TEMPLATE_STEPS, MOST_TEMPLATE_CHARACTERS
        self._deadline = time.monotonic() + LONGEST_RENDERING
        # The object is kept too: its address is its key as long as it lives.
        self._sizes: dict[int, tuple[Any, int, int]] = {}
        self._kept = 0

    def step(self, count: int = 1) -> None:
        """So many steps."""
        self._steps -= count
        if self._steps < 0:
            raise TooMuchError(f"it takes more than {MOST_TEMPLATE_STEPS:,} steps")
        if time.monotonic() > self._deadline:
            raise TooMuchError(f"it takes more than {LONGEST_RENDERING:g} seconds")

    def write(self, characters: int) -> None:
        """So many characters, of a text that is there or is to be made."""
        self.step()
        self._characters -= characters
        if self._characters < 0:
            raise TooMuchError(f"it writes more than {MOST_TEMPLATE_CHARACTERS:,} characters")

    def check(self, characters: int) -> None:
        """Whether one operation may make so many characters."""
        self.step()
        if characters > MOST_TEMPLATE_CHARACTERS:
            raise TooMuchError(f"one operation makes {characters:,} characters, more than {MOST_TEMPLATE_CHARACTERS:,}")

    def size(self, value: Any) -> tuple[int, int]:
        """The characters that a value has, written out, and how deep lists and mappings stand in one another."""
        if isinstance(value, TEXT):
            return len(value), 0
        if isinstance(value, int):
            return value.bit_length() // 3 + 1, 0
        if isinstance(value, MappingView):
            return self.size(list(value))  # type: ignore[call-overload]  # all views can be gone over
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
        if characters > LARGEST_TEMPLATE_OUTPUT:
            raise TooMuchError(f"a list or mapping holds more than {LARGEST_TEMPLATE_OUTPUT:,} characters")
        if self._kept > MOST_KEPT:
            self._sizes.clear()
            self._kept = 0
        self._kept += len(value) + 1
        self._sizes[id(value)] = value, characters, depth + 1
        return characters, depth + 1

    def made(self, value: Any) -> Any:
        """The value, just made, counted; what comes one by one is counted as it comes."""
        if isinstance(value, TEXT):
            self.write(len(value))
        elif isinstance(value, CONTAINER):
            self.size(value)
            self.step(1 + len(value) // 16)
        elif isinstance(value, GeneratorType):
            return self._one_by_one(value)
        elif isinstance(value, int) and value.bit_length() > LARGEST_INTEGER:
            raise TooMuchError(f"it makes an integer of more than {LARGEST_INTEGER:,} bits")
        else:
            self.step()
        return value

    def written(self, value: Any) -> Any:
        """The value, which becomes text."""
        self.write(self.size(value)[0])
        return value

    def passes(self, values: Any) -> Any:
        """What a loop goes over."""
        self.step(1 + (len(values) if isinstance(values, Sized) else 0))
        return values

    def compared(self, value: Any) -> Any:
        """The value, which is compared with another."""
        self.step()
        return value

    def passed(self, characters: int) -> str:
        """Nothing, in front of so many characters of the template itself."""
        self.write(characters)
        return ""

    def operator(self, name: str, left: Any, right: Any) -> None:
        """An operator that is about to be applied."""
        self.step()
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            result = {"*": sum(bits), "**": bits[0] * max(right, 1)}.get(name, max(bits))
            if max(*bits, result) > LARGEST_INTEGER:
                raise TooMuchError(f"{name} makes an integer of more than {LARGEST_INTEGER:,} bits")
        elif name == "*":
            count, repeated = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and isinstance(repeated, TEXT):
                self.check(len(repeated) * count)
            elif isinstance(count, int) and isinstance(repeated, CONTAINER):
                self.step(max(0, len(repeated) * count))
        elif name == "%" and isinstance(left, TEXT):
            self.printf(left, right)

    def function(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A method or filter that is about to be called with a value."""
        self.step()
        rest = (*args, *kwargs.values())
        numbers = sum(abs(each) for each in rest if isinstance(each, int))
        first = rest[0] if rest else ""
        texts = sum(len(each) for each in rest if isinstance(each, TEXT))
        if name in SLOW:
            if self.size(value)[0] + numbers + texts > LARGEST_SLOW:
                raise TooMuchError(f"{name} is given more than {LARGEST_SLOW:,} characters")
        elif name in ("encode", "decode") and not ENCODINGS.issuperset(str(each).lower() for each in rest):
            raise TooMuchError(f"{name} knows {', '.join(sorted(ENCODINGS))}, and nothing else")
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
            if numbers > MOST_DECIMALS:
                raise TooMuchError(f"{name} is asked for more than {MOST_DECIMALS} decimals")
        elif isinstance(value, TEXT):
            self.check((1 + len(value)) * (1 + texts + self.size([x for x in rest if isinstance(x, CONTAINER)])[0]))
        else:
            self.check((1 + _length(value)) * (1 + texts))

    def field(self, specification: str) -> None:
        """A field of a text that is about to be formatted, by its specification."""
        self.step()
        if any(len(number) > 5 or int(number) > WIDEST_FIELD for number in _NUMBER.findall(specification)):
            raise TooMuchError(f"a field is wider than {WIDEST_FIELD:,} characters")

    def fields(self, form: str, values: Any) -> None:
        """A text with fields in braces that is about to be formatted with a list or mapping of values."""
        self.check(len(form) + form.count("{") * self.size(values)[0])

    def printf(self, form: Any, values: Any) -> None:
        """A text with fields after percent signs that is about to be formatted."""
        if len(form) > LARGEST_SLOW:
            raise TooMuchError(f"% formats a text of more than {LARGEST_SLOW:,} characters")
        text = form if isinstance(form, str) else form.decode("latin-1")
        # Any number may be a width: keys in parentheses may hold whatever, so that no pattern finds the widths alone.
        self.field(text)
        if "*" in text and isinstance(values, tuple):
            self.field(" ".join(str(value) for value in values if isinstance(value, int)))
        times = text.count("%") if isinstance(values, Mapping) else 1
        self.check(len(text) + times * self.size(values)[0])

    def _one_by_one(self, values: Generator[Any, Any, Any]) -> Generator[Any, None, None]:
        for value in values:
            self.step()
            yield value


def gathered(value: Any) -> Any:
    """A list instead of what comes one by one, so that it can be looked at."""
    return list(value) if isinstance(value, Iterator) and not isinstance(value, LoopContext) else value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 1
