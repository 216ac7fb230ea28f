"""Patterns of a tokenizer.json, read as Oniguruma reads them: whether a search that goes back comes to an end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MOST_REPEATS = 1
"""Repetitions without an end, in one alternative of a pattern, after which the search may fail: each is one more power
of a text's length."""

MOST_WAYS = 10_000
"""Ways to take what stands before something that may fail, repetitions without an end aside."""

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
    counted), these repetitions, those of them after which it may fail, those before and in what is kept whole, and
    whether a repeated choice is at its end."""

    choice: bool = False
    ways: int = 1
    repeats: int = 0
    failing: int = 0
    held: int = 0
    risky: bool = False

    def then(self, part: "_Way", *, needed: bool) -> None:
        """Goes on with another part."""
        if needed and self.risky:
            raise _EndlessError(_NESTED)
        # What is kept whole is searched again for each way to take what stands before it.
        self.failing = max(self.repeats + part.failing, self.held) if needed else max(self.failing, part.failing)
        self.held = max(self.held, self.repeats + part.held if part.held else 0)
        self.ways = min(self.ways * part.ways, MOST_WAYS + 1)
        if self.failing > MOST_REPEATS or (needed and self.ways > MOST_WAYS):
            raise _EndlessError(_NESTED)
        self.choice |= part.choice
        self.repeats += part.repeats
        self.risky |= part.risky

    def kept(self) -> "_Way":
        """The same where it is never gone back into."""
        return _Way(failing=self.failing, held=max(min(self.repeats, 1), self.failing, self.held))

    def otherwise(self, other: "_Way") -> None:
        """Takes in another alternative."""
        self.choice |= other.choice
        self.ways += other.ways
        self.repeats, self.failing = max(self.repeats, other.repeats), max(self.failing, other.failing)
        self.held = max(self.held, other.held)
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
            one = one.kept()
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
        return _Way(repeats=1, failing=one.failing, held=one.held).kept()
    ways = one.ways ** min(least, _MANY)
    failing = one.failing + one.repeats * max(least - 1, 0)
    risky = one.risky or (one.choice and not quantifier["optional"])
    if (one.risky and not quantifier["optional"]) or failing > MOST_REPEATS or ways > MOST_WAYS:
        raise _EndlessError(_NESTED)
    if most is not None:
        ways = one.ways ** min(most, _MANY) + abs(most - least)
    choice, repeats = one.choice or not quantifier["fixed"], one.repeats + bool(quantifier["endless"])
    return _Way(choice, min(ways, MOST_WAYS + 1), repeats, failing, one.held, risky)


def _times(quantifier: str) -> tuple[int, int | None]:
    """How often something stands there: at least and at most, None without an end."""
    if quantifier[0] != "{":
        return int(quantifier[0] == "+"), 1 if quantifier[0] == "?" else None
    least, comma, most = quantifier[1 : quantifier.index("}")].partition(",")
    return int(least or 0), int(most) if most else None if comma else int(least)
