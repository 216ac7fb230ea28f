"""What the rules of a tokenizer.json may cost: how much they lengthen a text, and patterns that never come to an end.

A tokenizer.json holds rules of somebody else: replacements, one after the other, and patterns for a search that goes
back. They are looked at as the package `tokenizers` has read them, before any text goes through.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from .limits import LARGEST_GROWTH

MOST_REPEATS = 4
"""Repetitions without an end, in one alternative of a pattern: a search takes the power of a text's length."""

# A character may become so many bytes as one byte, at most: NFKD makes 33 of three.
_GROWTH = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 4, "ByteLevel": 2}

_ONCE = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})
"""What changes nothing a second time."""

_PART = re.compile(
    r"\\[pPx]\{[^}]*\}|\\.|\[|\((?:\?(?P<kind>[=!>]|<[=!]|<\w+>|[\w-]*:))?|[|)]|(?P<repeat>[*+][?+]?|\{\d+,\}\??)|"
    r"(?P<choice>\?[?+]?|\{\d*,?\d+\}\??)|[^\\]",
    re.DOTALL,
)


def check_rules(file: Path, *components: Any) -> None:
    """Raises FileFormatError, naming the file, for parts of a tokenizer that would take too much time or memory."""
    rules = [rule for component in components if component is not None for rule in _rules(component)]
    growth, seen = 1, set()
    for rule in rules:
        kind = rule.get("type", "")
        if kind not in seen or kind not in _ONCE:
            growth *= _growth(kind, rule)
        seen.add(kind)
        if growth > LARGEST_GROWTH:
            raise FileFormatError(
                f"{file}: expected rules that make a text at most {LARGEST_GROWTH:,} times as long, got more, from "
                f"{len(rules)} rules one after the other"
            )
        pattern = rule.get("pattern")
        if isinstance(pattern, Mapping) and "Regex" in pattern and never_ends(pattern["Regex"]):
            raise FileFormatError(
                f"{file}: expected patterns that a text is searched for in bounded time, got {pattern['Regex']!r}, "
                "with repetitions within repetitions"
            )


def _rules(component: Any) -> Iterator[Mapping[str, Any]]:
    """The rules of a component that change text, in order."""
    content = json.loads(component.__getstate__())
    stack = [content]
    while stack:
        rule = stack.pop()
        parts = next((rule[key] for key in ("normalizers", "pretokenizers", "decoders") if key in rule), None)
        if parts is None:
            yield rule
        else:
            stack += reversed(parts)


def _growth(kind: str, rule: Mapping[str, Any]) -> int:
    """Bytes that a byte may become at most."""
    match kind:
        case "Replace":
            pattern, new = rule["pattern"], len(rule["content"].encode())
            old = len(pattern["String"].encode()) if "String" in pattern else 0
            # A pattern may be found where nothing is, between any two characters.
            return -(-new // old) if new > old > 0 else 1 if old else 1 + new
        case "Prepend":
            return 1 + len(rule["prepend"].encode())
        case "Metaspace":
            return 1 + len(rule["replacement"].encode())
        case "Precompiled":
            return _longest(rule["precompiled_charsmap"])
    return _GROWTH.get(kind, 1)


def _longest(charsmap: str) -> int:
    """Bytes of the longest text that a table of sentencepiece puts in place of another."""
    try:
        table = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return LARGEST_GROWTH + 1
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(map(len, texts.split(b"\0")), default=1) or 1


def never_ends(pattern: str) -> bool:
    """Whether a search that goes back may need more steps than any power of the text's length, or a high one.

    So it is where what is repeated without an end has a choice of its own, a repetition or alternatives, and something
    that may fail comes after. Groups that are never gone back into, and what is only looked ahead for, are choices no
    more once they are closed.
    """
    # Of each open group: whether there was a choice before it, repetitions before it, whether its outer one is closed.
    groups: list[tuple[bool, int, bool]] = []
    choice, repeats, closed = False, 0, False
    last = risky = False  # whether there is a choice in the last part; whether it is repeated without an end
    position = 0
    while position < len(pattern):
        part = _PART.match(pattern, position)
        if part is None:
            return True
        text, position = part[0], part.end()
        if risky and text not in "|)":
            return True
        if text == "[":
            position, last = _end_of_class(pattern, position), False
        elif text.startswith("("):
            groups.append((choice, repeats, closed))
            choice, repeats, closed = False, 0, part["kind"] in ("=", "!", ">", "<=", "<!")
        elif text == ")" and groups:
            last, inner = choice and not closed, 0 if closed else repeats
            choice, repeats, closed = groups.pop()
            choice, repeats = choice or last, repeats + inner
        elif text == "|" and groups:
            choice = True
        elif text == "|":
            repeats, last, risky = 0, False, False
        elif part["repeat"]:
            repeats += 1
            risky = last and text not in ("*+", "++")
            if repeats > MOST_REPEATS:
                return True
            choice = last = True
        elif part["choice"]:
            choice = last = True
        else:
            last = False
    return False


def _end_of_class(pattern: str, position: int) -> int:
    """Where a class of characters, whose bracket is open, is closed; classes may stand within one another."""
    depth, first = 1, True
    while position < len(pattern) and depth:
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character == "[":
            depth += 1
        elif character == "]" and not first:
            depth -= 1
        first = first and character == "^"
        position += 1
    return position
