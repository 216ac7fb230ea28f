"""Backtracking of patterns in a tokenizer.json: a bound of the search time, by the syntax of Oniguruma."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_UNBOUNDED_REPEATS = 1
"""Unbounded repetitions in one alternative of a pattern after which the search can fail. Each multiplies the time by
the length of the text."""

MAX_WAYS = 10_000
"""Ways to match the part before a part that can fail, without the choices of unbounded repetitions."""

# Other syntax of Oniguruma is refused: calls of groups, absent operators, conditions, comments, free spacing, callouts,
# and control characters (which include the next character).
_PART = re.compile(
    r"(?P<options>\(\?[im-]+\))|(?P<open>\((?:\?(?P<look>[=!>]|<[=!])|\?(?:<\w+>|(?P<flags>[im-]*):)|(?![?*])))|(?P<close>\))|"
    r"(?P<or>\|)|(?P<set>\[\^?)|(?P<back>\\[1-9]|\\k<-?\w+>)|"
    r"(?P<endless>[*+]|\{\d+,\})(?P<possessive>(?<=[*+])\+)?\??|(?P<some>\{\d*,\d+\}\??)|(?P<fixed>\{\d+\})|"
    r"(?P<optional>\?[?+]?)|\\[pPxo]\{[^}]*\}|\\[AbBdDhHnNOrRsStfvaewWXzZxu0]|\\[^a-zA-Z\d]|[^\\(]",
    re.DOTALL,
)
# A member of a character class: a bracket of POSIX, or a character.
_MEMBER = re.compile(r"\[:\^?[a-z]+:\]|\\[^cCM]|(?P<open>\[(?!:)\^?)|(?P<close>\])|[^\\[]", re.DOTALL)
_MANY = MAX_WAYS.bit_length()
_NESTED = "repetitions within repetitions"
_QUANTIFIERS = ("endless", "some", "fixed", "optional")


def unbounded_reason(pattern: str) -> str | None:
    """The part of a pattern that can make backtracking exponential, or a high power of the length; None if none does.

    Backtracking is exponential if a repeated part contains a choice (a repetition or alternatives) and a part that can
    fail follows. It is a high power if such a part follows several unbounded repetitions. A reference to a group counts
    as an unbounded repetition. Unknown syntax counts as such a part.
    """
    parts = _Parts(pattern)
    try:
        _alternatives(parts)
        parts.check_end()
    except _UnboundedError as error:
        return str(error)
    return None


class _UnboundedError(Exception):
    """The time of a search has no acceptable bound; the message names the part of the pattern."""


class _Parts:
    """Parser of a pattern, one part at a time."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._position = 0

    def take(self, kinds: Sequence[str] = ()) -> re.Match[str] | None:
        """The next part, if there is one of these kinds (of any kind by default)."""
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
        """Raises _UnboundedError if a part of the pattern is left."""
        if self._position < len(self._pattern):
            left = self._pattern[self._position : self._position + 8]
            raise _UnboundedError(f"{left!r} at character {self._position}, which is not supported")

    def _skip_class(self) -> None:
        """Skips the rest of a character class, with nested classes. A closing bracket at its start is a character."""
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
    """Choices that backtracking has in a part of a pattern.

    `choice`: it has a choice. `ways`: number of ways without unbounded repetitions. `repeats`: unbounded repetitions.
    `failing`: those after which it can fail. `atomic`: those before and in atomic parts. `risky`: it ends with a
    repeated choice.
    """

    choice: bool = False
    ways: int = 1
    repeats: int = 0
    failing: int = 0
    atomic: int = 0
    risky: bool = False

    def then(self, part: "_Way", *, needed: bool) -> None:
        """Appends another part."""
        if needed and self.risky:
            raise _UnboundedError(_NESTED)
        # An atomic part is searched again for each way to match the part before it.
        self.failing = max(self.repeats + part.failing, self.atomic) if needed else max(self.failing, part.failing)
        self.atomic = max(self.atomic, self.repeats + part.atomic if part.atomic else 0)
        self.ways = min(self.ways * part.ways, MAX_WAYS + 1)
        if self.failing > MAX_UNBOUNDED_REPEATS or (needed and self.ways > MAX_WAYS):
            raise _UnboundedError(_NESTED)
        self.choice |= part.choice
        self.repeats += part.repeats
        self.risky |= part.risky

    def as_atomic(self) -> "_Way":
        """The same part as an atomic part, without backtracking into it."""
        return _Way(failing=self.failing, atomic=max(min(self.repeats, 1), self.failing, self.atomic))

    def otherwise(self, other: "_Way") -> None:
        """Adds an alternative."""
        self.choice |= other.choice
        self.ways += other.ways
        self.repeats, self.failing = max(self.repeats, other.repeats), max(self.failing, other.failing)
        self.atomic = max(self.atomic, other.atomic)
        self.risky |= other.risky


def _alternatives(parts: _Parts, *, folds: bool = False) -> _Way:
    """Reads to the end of a group or of the pattern. If case `folds`, a class can match one character or several, such
    as ss for a sharp s."""
    whole, way = _Way(ways=0), _Way()
    while (part := parts.take()) is not None and not part["close"]:
        if part["or"]:
            whole.otherwise(way)
            whole.choice, way = True, _Way()
            continue
        if part["options"]:
            # Options apply to the rest of the group, which is read as a group of its own.
            way.then(_alternatives(parts, folds=folds or "i" in part[0]), needed=True)
            break
        one = _Way()
        if part["open"]:
            one = _alternatives(parts, folds=folds or "i" in (part["flags"] or ""))
        if part["set"] and folds:
            one = _Way(choice=True, ways=2)
        if part["back"]:
            # A reference compares the text of the group, and can fail.
            one = _Way(choice=True, repeats=1, failing=1)
        if part["look"]:
            # There is no backtracking into lookaround and atomic groups.
            one = one.as_atomic()
        needed = True
        while (quantifier := parts.take(_QUANTIFIERS)) is not None:
            least, most = _times(quantifier[0])
            needed &= least > 0
            one = _repeated(one, quantifier, least, most)
        way.then(one, needed=needed)
    whole.otherwise(way)
    return whole


def _repeated(one: _Way, quantifier: re.Match[str], least: int, most: int | None) -> _Way:
    if quantifier["possessive"]:
        return _Way(repeats=1, failing=one.failing, atomic=one.atomic).as_atomic()
    ways = one.ways ** min(least, _MANY)
    failing = one.failing + one.repeats * max(least - 1, 0)
    risky = one.risky or (one.choice and not quantifier["optional"])
    if (one.risky and not quantifier["optional"]) or failing > MAX_UNBOUNDED_REPEATS or ways > MAX_WAYS:
        raise _UnboundedError(_NESTED)
    if most is not None:
        ways = one.ways ** min(most, _MANY) + abs(most - least)
    choice, repeats = one.choice or not quantifier["fixed"], one.repeats + bool(quantifier["endless"])
    return _Way(choice, min(ways, MAX_WAYS + 1), repeats, failing, one.atomic, risky)


def _times(quantifier: str) -> tuple[int, int | None]:
    """The minimum and maximum of a quantifier; None for no maximum."""
    if quantifier[0] != "{":
        return int(quantifier[0] == "+"), 1 if quantifier[0] == "?" else None
    least, comma, most = quantifier[1 : quantifier.index("}")].partition(",")
    return int(least or 0), int(most) if most else None if comma else int(least)
