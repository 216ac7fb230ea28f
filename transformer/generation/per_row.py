"""Options of each row, from options that are one value for all rows or a value for each."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeGuard

from ..errors import ArgumentError, shown
from .row_options import RowOptions

NUMBERS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "seed",
)
"""Options of a row that are numbers."""

LISTS = {"stop_tokens": 1, "stop_sequences": 2, "stop_strings": 1}
"""Options of a row that are lists, each with its depth: a list of ids, or of sequences of ids, or of texts."""


def checked_rows(options: Mapping[str, Any]) -> list[RowOptions]:
    """The options of each row that these, of `GenerationOptions` by name, have values for: of one, if all are alike.

    Raises ArgumentError, with the name of the option, for invalid values.
    """
    given = _values_of_rows(options)
    return row_options(options, max([1, *map(len, given.values())]))


def row_options(options: Mapping[str, Any], batch: int) -> list[RowOptions]:
    """The options of each of `batch` rows.

    Raises ArgumentError, with the option, for invalid values, and if one has values for another number of rows.
    """
    of_rows = _values_of_rows(options)
    for name, values in of_rows.items():
        if len(values) != batch:
            raise ArgumentError(
                f"{name}: expected one value for all rows, or a list of one for each of {batch}, got {len(values)} "
                f"values: {shown(options[name])}"
            )
    if None in of_rows.get("max_new_tokens", ()):
        raise ArgumentError(f"max_new_tokens: expected a number for each row, got {shown(options['max_new_tokens'])}")
    common = {each.name: options[each.name] for each in fields(RowOptions)}
    common["forced_eos_token_id"] = _tuple_of(common["forced_eos_token_id"])
    if not of_rows:
        return [RowOptions(**_normal(common))] * batch
    return [
        RowOptions(**_normal(common | {name: values[row] for name, values in of_rows.items()})) for row in range(batch)
    ]


def _values_of_rows(options: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """The options that have a value for each row."""
    given = {name: options[name] for name in (*NUMBERS, *LISTS)}
    found = {name: given[name] for name in NUMBERS if isinstance(given[name], list | tuple)}
    return found | {name: given[name] for name, depth in LISTS.items() if _has_rows(name, given[name], depth)}


def _has_rows(name: str, value: object, depth: int) -> bool:
    """True if a list has a list for each row: if it is deeper than one for all rows.

    Raises ArgumentError if it is deeper in some of its entries only.
    """
    if not _is_list(value) or not value:
        return False
    depths = {_depth(each) for each in value if not _is_list(each) or len(each)}
    if depth == 2 and not depths:
        # Lists without entries can be sequences without ids, or rows without sequences.
        return False
    has_rows = not depths or max(depths) >= depth
    if has_rows and (min(depths, default=depth) < depth or not all(map(_is_list, value))):
        raise ArgumentError(
            f"{name}: expected entries of one kind, for all rows or a list for each row, got {shown(value)}"
        )
    return has_rows


def _depth(value: object) -> int:
    """How deep lists are in it: 0 for an id or a text."""
    return 1 + max(map(_depth, value), default=0) if _is_list(value) else 0


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _tuple_of(value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if _is_list(value) else (value,)


def _normal(values: dict[str, Any]) -> dict[str, Any]:
    """The values with lists as tuples."""
    sequences = values["stop_sequences"]
    if _is_list(sequences):
        sequences = tuple(tuple(each) if _is_list(each) else each for each in sequences)
    texts = values["stop_strings"]
    return values | {
        "stop_tokens": _tuple_of(values["stop_tokens"]),
        "stop_sequences": sequences,
        "stop_strings": (texts,) if isinstance(texts, str) else _tuple_of(texts),
    }
