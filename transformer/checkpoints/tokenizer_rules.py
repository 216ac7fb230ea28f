"""Bounds of the rules of a tokenizer.json: how much they lengthen a text, and patterns that never come to an end.

A tokenizer.json holds rules of somebody else: replacements, one after the other, and patterns for a search that goes
back. They are looked at as the package `tokenizers` has read them, before any text goes through.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from .limits import LARGEST_GROWTH

MOST_REPEATS = 1
"""Repetitions without an end, in one alternative of a pattern, after which the search may fail: each is one more power
of a text's length."""

MOST_WAYS = 10_000
"""Ways to take what stands before something that may fail, repetitions without an end aside."""

# A character may become so many bytes as one byte, at most: NFKD makes 33 of three.
_GROWTH = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 4, "ByteLevel": 2}

_ONCE = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})
"""What changes nothing a second time."""

# What is none of these, in the syntax of Oniguruma, is refused: calls of groups, absent operators, conditions,
# comments, free spacing, callouts, control characters (of which each takes the next character in).
_PART = re.compile(
    r"(?P<options>\(\?[im-]+\))|(?P<open>\((?:\?(?P<look>[=!>]|<[=!])|\?(?:<\w+>|(?P<flags>[im-]*):)|(?![?*])))|(?P<close>\))|"
    r"(?P<or>\|)|(?P<set>\[\^?)|(?P<back>\\[1-9]|\\k<-?\w+>)|"
    r"(?P<endless>[*+]|\{\d+,\})(?P<kept>(?<=[*+])\+)?\??|(?P<some>\{\d*,\d+\}\??)|(?P<fixed>\{\d+\})|"
    r"(?P<optional>\?[?+]?)|\\[pPxo]\{[^}]*\}|\\[AbBdDhHnNOrRsStfvaewWXzZxu0]|\\[^a-zA-Z\d]|[^\\(]",
    re.DOTALL,
)
# What stands in a class: a bracket of POSIX, or a character.
_MEMBER = re.compile(r"\[:\^?[a-z]+:\]|\\[^cCM]|(?P<open>\[(?!:)\^?)|(?P<close>\])|[^\\[]", re.DOTALL)
_MANY = MOST_WAYS.bit_length()
_NESTED = "repetitions within repetitions"
_QUANTIFIERS = ("endless", "some", "fixed", "optional")


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
        regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        reason = None if regex is None else why_endless(regex)
        if reason is not None:
            raise FileFormatError(
                f"{file}: expected patterns that a text is searched for in bounded time, got {regex!r}, with {reason}"
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


def why_endless(pattern: str) -> str | None:
    """What in a pattern may make a search that goes back need more steps than any power of the text's length, or a high
    one; None where nothing does.

    So it is where what is repeated has a choice of its own, a repetition or alternatives, and something that may fail
    comes after; and where such things come after several repetitions without an end. A reference to a group counts as
    such a repetition. What is not understood here may hide anything.
    """
    parts = _Parts(pattern)
    try:
        _alternatives(parts)
        parts.check_end()
    except _EndlessError as error:
        return str(error)
    return None


class _EndlessError(Exception):
    """The pattern may never come to an end; the message is what in it is why."""


class _Parts:
    """The parts of a pattern, one after the other, as names and matches."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._position = 0

    def take(self, kinds: Sequence[str] = ()) -> re.Match[str] | None:
        """The next part, if there is one, and it is of these kinds or none are given."""
        part = _PART.match(self._pattern, self._position)
        if part is None and not kinds:
            self.check_end()
        if part is None or (kinds and not any(part[kind] for kind in kinds)):
            return None
        self._position = part.end()
        if part["set"]:
            self._skip_class()
        return part

    def check_end(self) -> None:
        """Raises _EndlessError where something is left."""
        if self._position < len(self._pattern):
            left = self._pattern[self._position : self._position + 8]
            raise _EndlessError(f"{left!r} at character {self._position}, which is not supported")

    def _skip_class(self) -> None:
        """Goes to where a class of characters, whose bracket is open, is closed; classes may stand within one another.

        A closing bracket that comes first is a character.
        """
        depth, first = 1, True
        while depth:
            member = _MEMBER.match(self._pattern, self._position)
            if member is None:
                self.check_end()
                return
            depth += bool(member["open"]) - (bool(member["close"]) and not first)
            first = bool(member["open"])
            self._position = member.end()


@dataclass(slots=True)
class _Way:
    """What a part of a pattern leaves to be tried: whether it has a choice, its ways (repetitions without an end not
    counted), these repetitions, those of them after which it may fail, and whether a repeated choice is at its end."""

    choice: bool = False
    ways: int = 1
    repeats: int = 0
    failing: int = 0
    risky: bool = False

    def then(self, part: "_Way", *, needed: bool) -> None:
        """Goes on with another part."""
        if needed and self.risky:
            raise _EndlessError(_NESTED)
        self.failing = self.repeats + part.failing if needed else max(self.failing, part.failing)
        self.ways = min(self.ways * part.ways, MOST_WAYS + 1)
        if self.failing > MOST_REPEATS or (needed and self.ways > MOST_WAYS):
            raise _EndlessError(_NESTED)
        self.choice |= part.choice
        self.repeats += part.repeats
        self.risky |= part.risky

    def otherwise(self, other: "_Way") -> None:
        """Takes in another alternative."""
        self.choice |= other.choice
        self.ways += other.ways
        self.repeats, self.failing = max(self.repeats, other.repeats), max(self.failing, other.failing)
        self.risky |= other.risky


def _alternatives(parts: _Parts, *, folds: bool = False) -> _Way:
    """Reads up to where a group is closed, or the pattern ends. Where case `folds`, a class may take one character or
    several, such as ss for a sharp s."""
    whole, way = _Way(ways=0), _Way()
    while (part := parts.take()) is not None and not part["close"]:
        if part["or"]:
            whole.otherwise(way)
            whole.choice, way = True, _Way()
            continue
        if part["options"]:
            # They hold up to where the group is closed, and so does a group of what comes after them.
            way.then(_alternatives(parts, folds=folds or "i" in part[0]), needed=True)
            break
        one = _Way()
        if part["open"]:
            one = _alternatives(parts, folds=folds or "i" in (part["flags"] or ""))
        if part["set"] and folds:
            one = _Way(choice=True, ways=2)
        if part["back"]:
            # It compares as much as the group has, and may fail.
            one = _Way(choice=True, repeats=1, failing=1)
        if part["look"]:
            # What is looked at ahead or behind, or kept whole, is never gone back into.
            one = _Way(failing=one.failing)
        needed = True
        while (quantifier := parts.take(_QUANTIFIERS)) is not None:
            least, most = _times(quantifier[0])
            needed &= least > 0
            one = _repeated(one, quantifier, least, most)
        way.then(one, needed=needed)
    whole.otherwise(way)
    return whole


def _repeated(one: _Way, quantifier: re.Match[str], least: int, most: int | None) -> _Way:
    if quantifier["kept"]:
        return _Way(failing=one.failing)
    ways = one.ways ** min(least, _MANY)
    failing = one.failing + one.repeats * max(least - 1, 0)
    risky = one.risky or (one.choice and not quantifier["optional"])
    if (one.risky and not quantifier["optional"]) or failing > MOST_REPEATS or ways > MOST_WAYS:
        raise _EndlessError(_NESTED)
    if most is not None:
        ways = one.ways ** min(most, _MANY) + abs(most - least)
    choice = one.choice or not quantifier["fixed"]
    return _Way(choice, min(ways, MOST_WAYS + 1), one.repeats + bool(quantifier["endless"]), failing, risky)


def _times(quantifier: str) -> tuple[int, int | None]:
    """How often something stands there: at least and at most, None without an end."""
    if quantifier[0] != "{":
        return int(quantifier[0] == "+"), 1 if quantifier[0] == "?" else None
    least, comma, most = quantifier[1 : quantifier.index("}")].partition(",")
    return int(least or 0), int(most) if most else None if comma else int(least)
