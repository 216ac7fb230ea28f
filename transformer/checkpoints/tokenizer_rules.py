"""Limits of the rules of a tokenizer.json: growth of a text, and search time of patterns.

The rules of a tokenizer.json are untrusted: replacements in sequence, and patterns for a backtracking search. They are
checked as the package `tokenizers` has parsed them, before they are applied to a text.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from .limits import MAX_TEXT_GROWTH
from .tokenizer_patterns import unbounded_reason

# Maximum bytes of the result per byte of the input: NFKD turns 3 bytes into 33.
_GROWTH = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 4, "ByteLevel": 2}

_ONCE = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})
"""Rules that change nothing when they are applied again."""


def check_rules(file: Path, *components: Any) -> None:
    """Raises FileFormatError, with the file, for rules of a tokenizer that can take too much time or memory."""
    rules = [rule for component in components if component is not None for rule in _rules(component)]
    growth, seen = 1, set()
    for rule in rules:
        kind = rule.get("type", "")
        if kind not in seen or kind not in _ONCE:
            growth *= _growth(kind, rule)
        seen.add(kind)
        if growth > MAX_TEXT_GROWTH:
            raise FileFormatError(
                f"{file}: expected rules that make a text at most {MAX_TEXT_GROWTH:,} times as long, got more from "
                f"{len(rules)} rules in sequence"
            )
        pattern = rule.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        reason = None if regex is None else unbounded_reason(regex)
        if reason is not None:
            raise FileFormatError(f"{file}: expected patterns with a bounded search time, got {regex!r}, with {reason}")


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
    """Maximum bytes of the result of a rule per byte of the input."""
    match kind:
        case "Replace":
            pattern, new = rule["pattern"], len(rule["content"].encode())
            old = len(pattern["String"].encode()) if "String" in pattern else 0
            # A pattern can match the empty text between any two characters.
            return -(-new // old) if new > old > 0 else 1 if old else 1 + new
        case "Prepend":
            return 1 + len(rule["prepend"].encode())
        case "Metaspace":
            return 1 + len(rule["replacement"].encode())
        case "Precompiled":
            return _longest(rule["precompiled_charsmap"])
    return _GROWTH.get(kind, 1)


def _longest(charsmap: str) -> int:
    """Bytes of the longest replacement in a character map of sentencepiece."""
    try:
        table = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return MAX_TEXT_GROWTH + 1
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(map(len, texts.split(b"\0")), default=1) or 1
