"""Bounds of the rules of a tokenizer.json: how much they lengthen a text, and patterns that never come to an end.

A tokenizer.json holds rules of somebody else: replacements, one after the other, and patterns for a search that goes
back. They are looked at as the package `tokenizers` has read them, before any text goes through.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from .limits import LARGEST_GROWTH
from .tokenizer_patterns import why_endless

# A character may become so many bytes as one byte, at most: NFKD makes 33 of three.
_GROWTH = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 4, "ByteLevel": 2}

_ONCE = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})
"""What changes nothing a second time."""


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
