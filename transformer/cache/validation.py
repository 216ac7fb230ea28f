"""Checks of what a file says that a conversation is: its options and numbers, against its tensors.

A digest tells that a file is as it was written, not who wrote it. All functions raise ValueError, with what was
expected and what came.
"""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .lengths import EMPTY, Lengths
from .snapshot import CROSS, SELF, Snapshot

LARGEST_OPTION = (1 << 31) - 1
"""Of heads, widths, windows and buffers, as PyTorch's kernels count them."""

LONGEST_ROW = 1 << 53
"""Tokens of a row: positions are formed in float64, which is exact up to there."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What attention works on."""

Layer = tuple[dict[str, Any], Snapshot]
"""Options and contents of one layer's cache."""


def check_layers(described: object, tensors: Mapping[str, Tensor]) -> dict[str, Layer | None]:
    """The layers by module path that are described, with their tensors, whose slots without a token are then zero."""
    if not isinstance(described, dict) or not described:
        raise ValueError(f"expected layers by module path, got {reprlib.repr(described)}")
    own: dict[str, dict[str, Tensor]] = {name: {} for name in described}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in own or described[name] is None:
            raise ValueError(f"expected tensors of the layers that are described, got {key!r}")
        own[name][kind] = tensor
    layers = {name: None if layer is None else _layer(name, layer, own[name]) for name, layer in described.items()}
    batches = {tensor.shape[0] for tensor in tensors.values()}
    if len(batches) > 1:
        raise ValueError(f"expected as many rows in each layer, got {sorted(batches)}")
    return layers


def _layer(name: str, described: object, tensors: dict[str, Tensor]) -> Layer:
    if not isinstance(described, dict) or described.keys() != {"options", "numbers"}:
        raise ValueError(f"expected options and numbers in {name!r}, got {reprlib.repr(described)}")
    options = _options(name, described["options"])
    expected = _expected_tensors(options, tensors)
    if tensors.keys() != expected:
        raise ValueError(f"expected the tensors {sorted(expected)} in {name!r}, got {sorted(tensors)}")
    if SELF[0] in tensors:
        numbers = _tokens(name, options, described["numbers"], tensors)
    else:
        numbers = _plain(name, described["numbers"], {})
    if CROSS[0] in tensors:
        _check_source(name, options, tensors)
    return options, Snapshot(numbers, tensors)


def _options(name: str, described: object) -> dict[str, Any]:
    options = _plain(
        name,
        described,
        {
            "num_kv_heads": _is_count,
            "head_dim": _is_count,
            "num_sinks": lambda value: type(value) is int and 0 <= value <= LARGEST_OPTION,
            "window_size": _is_count_or_none,
            "max_length": _is_count_or_none,
            "position": lambda value: value is None or isinstance(value, str),
        },
    )
    sinks, window, most = options["num_sinks"], options["window_size"], options["max_length"]
    if sinks and window is None:
        raise ValueError(f"expected no num_sinks without a window_size in {name!r}, got {sinks}")
    if most is not None and window is not None and most < window + sinks:
        raise ValueError(f"expected a max_length of at least {window + sinks} in {name!r}, got {most}")
    return options


def _expected_tensors(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> set[str]:
    """What there must be beside the keys, of tokens and of a source, that there are."""
    expected: set[str] = set()
    if not tensors.keys().isdisjoint(SELF):
        expected |= {*(SELF if options["num_sinks"] else SELF[:2])}
    if not tensors.keys().isdisjoint(CROSS):
        # What a source was projected from is not always kept, nor always masked.
        kept = CROSS[2] in tensors, CROSS[3] in tensors
        expected |= {*(CROSS[:4] if all(kept) else CROSS[:3] if kept[0] else CROSS[:2])}
    return expected


def _tokens(name: str, options: Mapping[str, Any], described: object, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The numbers of the tokens that are held, against their tensors."""
    key, sinks = tensors[SELF[0]], options["num_sinks"]
    _check_pair(name, options, key, tensors[SELF[1]])
    numbers = _plain(
        name,
        described,
        {**dict.fromkeys(("stored", "start", "length"), _are_lengths(key.shape[0])), "window": _is_count_or_none},
    )
    stored, start, length = (Lengths.of(numbers[each]) for each in ("stored", "start", "length"))
    window = options["window_size"] if numbers["window"] is None else numbers["window"]
    if options["window_size"] not in (None, window):
        raise ValueError(f"expected a window of {options['window_size']} in {name!r}, got {window}")
    # What has been let go of, a window has let go of, and never tokens within it.
    latest = EMPTY if window is None else (length - window).maximum(0)
    for smaller, larger in ((stored, start), (start, length), (start, latest)):
        if max(smaller - larger) > 0:
            raise ValueError(
                f"expected stored <= start <= length in {name!r}, and a start that no token within the window of "
                f"{window} is before, got {stored}, {start}, {length}"
            )
    count = length - stored
    if key.shape[2] != max(count):
        raise ValueError(f"expected keys of {max(count)} tokens in {name!r}, got {key.shape[2]}")
    held = length - start + start.minimum(sinks)
    if options["max_length"] is not None and max(held) > options["max_length"]:
        raise ValueError(f"expected at most max_length={options['max_length']} tokens in {name!r}, got {max(held)}")
    for kind in SELF[:2]:
        tensors[kind] = _cleared(tensors[kind], count)
    for kind in SELF[2:] if sinks else ():
        expected = [*key.shape[:2], sinks, key.shape[3]]
        if list(tensors[kind].shape) != expected or tensors[kind].dtype != key.dtype:
            raise ValueError(f"expected {kind} {expected} of {key.dtype} in {name!r}, got {_told(tensors[kind])}")
        tensors[kind] = _cleared(tensors[kind], length)
    return {"stored": list(stored), "start": list(start), "length": list(length), "window": numbers["window"]}


def _check_source(name: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    key = tensors[CROSS[0]]
    _check_pair(name, options, key, tensors[CROSS[1]])
    batch, _, tokens, _ = key.shape
    source, mask = tensors.get(CROSS[2]), tensors.get(CROSS[3])
    if source is not None and not (source.ndim == 3 and source.shape[:2] == (batch, tokens) and source.dtype in FLOATS):
        raise ValueError(f"expected {CROSS[2]} [{batch}, {tokens}, E] of floats in {name!r}, got {_told(source)}")
    if mask is not None and not (mask.shape == (batch, tokens) and mask.dtype == torch.bool):
        raise ValueError(f"expected {CROSS[3]} [{batch}, {tokens}] of bool in {name!r}, got {_told(mask)}")


def _check_pair(name: str, options: Mapping[str, Any], key: Tensor, value: Tensor) -> None:
    """Raises unless keys and values are alike, [B, G, L, D] of floats, with a row at least."""
    heads, width = options["num_kv_heads"], options["head_dim"]
    fits = key.ndim == 4 and key.shape[0] > 0 and (key.shape[1], key.shape[3]) == (heads, width)
    if not fits or key.dtype not in FLOATS:
        raise ValueError(f"expected keys [B, {heads}, L, {width}] of floats in {name!r}, got {_told(key)}")
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(f"expected values as the keys, {_told(key)}, in {name!r}, got {_told(value)}")


def _plain(name: str, described: object, expected: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """What is described, which has exactly the names that are expected, each with a value of its kind."""
    if not isinstance(described, dict) or described.keys() != expected.keys():
        raise ValueError(f"expected {sorted(expected)} in {name!r}, got {reprlib.repr(described)}")
    for key, fits in expected.items():
        if not fits(described[key]):
            raise ValueError(f"expected another {key} in {name!r} than {reprlib.repr(described[key])}")
    return described


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_OPTION


def _is_count_or_none(value: object) -> bool:
    return value is None or _is_count(value)


def _are_lengths(batch: int) -> Callable[[Any], bool]:
    """Whether a value is one number of tokens for all rows, or one for each."""

    def fits(value: object) -> bool:
        if not isinstance(value, list) or len(value) not in (1, batch):
            return False
        return all(type(number) is int and 0 <= number <= LONGEST_ROW for number in value)

    return fits


def _cleared(tensor: Tensor, count: Lengths) -> Tensor:
    """The tensor [B, G, L, D], with zeros after so many tokens of each row: there, not even NaN may stand."""
    if min(count) >= tensor.shape[2]:
        return tensor
    dead = torch.arange(tensor.shape[2], device="cpu") >= count.column()
    return tensor.masked_fill(dead.to(tensor.device)[:, None, :, None], 0.0)


def _told(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"
