"""Checks of a saved conversation: its options and numbers, against its tensors.

A digest proves that a file is unchanged, not who wrote it. All functions raise ValueError, with what was expected and
what came.
"""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..codecs import CODECS
from ..masks import NO_TOKEN
from .kept import KeptTokens
from .lengths import EMPTY, Lengths
from .prefix_validation import are_rows, check_prefix
from .snapshot import CROSS, FLOATS, FLOATS_BY_NAME, KEPT, OBSERVED, PREFIX, SELF, Snapshot
from .spec import CacheSpec, is_count_or_none

LONGEST_ROW = 1 << 53
"""Tokens of a row: positions are formed in float64, which is exact up to there."""

Layer = tuple[CacheSpec, Snapshot]
"""Specification and contents of one layer's cache."""


def check_layers(described: object, tensors: Mapping[str, Tensor]) -> dict[str, Layer | None]:
    """The described layers by module path, with their tensors, whose slots without a token are then zero."""
    if not isinstance(described, dict) or not described:
        raise ValueError(f"expected layers by module path, got {reprlib.repr(described)}")
    own: dict[str, dict[str, Tensor]] = {name: {} for name in described}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in own or described[name] is None:
            raise ValueError(f"expected tensors of the layers that are described, got {key!r}")
        own[name][kind] = tensor
    layers = {name: None if layer is None else _layer(name, layer, own[name]) for name, layer in described.items()}
    batches = {tensor.shape[0] for key, tensor in tensors.items() if not key.endswith(PREFIX)}
    if len(batches) > 1:
        raise ValueError(f"expected as many rows in each layer, got {sorted(batches)}")
    return layers


def _layer(name: str, described: object, tensors: dict[str, Tensor]) -> Layer:
    if not isinstance(described, dict) or described.keys() != {"options", "numbers"}:
        raise ValueError(f"expected options and numbers in {name!r}, got {reprlib.repr(described)}")
    spec = _spec(name, described["options"])
    expected = _expected_tensors(spec, tensors)
    if tensors.keys() != expected:
        raise ValueError(f"expected the tensors {sorted(expected)} in {name!r}, got {sorted(tensors)}")
    read_as: dict[str, Callable[[Any], bool]] = {}
    if spec.cache_dtype is not None and tensors:
        # What records are read as: a codec does not say it.
        read_as = {"dtype": lambda value: isinstance(value, str) and value in FLOATS_BY_NAME}
    if SELF[0] in tensors:
        numbers = _tokens(name, spec, described["numbers"], tensors, read_as)
    else:
        numbers = _plain(name, described["numbers"], read_as)
    if CROSS[0] in tensors:
        _check_source(name, spec, tensors)
    return spec, Snapshot(numbers, tensors)


def _spec(name: str, described: object) -> CacheSpec:
    if not isinstance(described, dict):
        raise ValueError(f"expected options in {name!r}, got {reprlib.repr(described)}")
    try:
        return CacheSpec.from_fields(described)
    except ValueError as error:
        raise ValueError(f"{error} in {name!r}") from None


def _expected_tensors(spec: CacheSpec, tensors: Mapping[str, Tensor]) -> set[str]:
    """The names that the tensors of a layer must have, by the keys that there are."""
    expected: set[str] = set()
    if not tensors.keys().isdisjoint(SELF):
        expected |= {*(SELF if spec.num_sinks else SELF[:2])}
        # Only after a compression, and only where a budget observes something for its policy.
        expected |= {KEPT, *OBSERVED} & tensors.keys()
        # Only where rows share a prompt.
        expected |= set() if tensors.keys().isdisjoint(PREFIX) else {*PREFIX}
    if not tensors.keys().isdisjoint(CROSS):
        # The source itself is not always kept, nor always masked.
        kept = CROSS[2] in tensors, CROSS[3] in tensors
        expected |= {*(CROSS[:4] if all(kept) else CROSS[:3] if kept[0] else CROSS[:2])}
    return expected


def _tokens(
    name: str,
    spec: CacheSpec,
    described: object,
    tensors: dict[str, Tensor],
    read_as: Mapping[str, Callable[[Any], bool]],
) -> dict[str, Any]:
    """The numbers of the cached tokens, checked against their tensors."""
    key, sinks = tensors[SELF[0]], spec.num_sinks
    _check_pair(name, spec, key, tensors[SELF[1]])
    kept_names = ("kept_first", "kept_end") if KEPT in tensors else ()
    names = "stored", "start", "length", *kept_names
    lengths = dict.fromkeys(names, _are_lengths(key.shape[0]))
    shared = {"prefix_rows": are_rows(key.shape[0])} if PREFIX[0] in tensors else {}
    numbers = _plain(name, described, {**lengths, **shared, "window": is_count_or_none, **read_as})
    stored, start, length, *kept = (Lengths.of(numbers[each]) for each in names)
    first, end = kept or (EMPTY, EMPTY)
    window = spec.window_size if numbers["window"] is None else numbers["window"]
    if spec.window_size not in (None, window):
        raise ValueError(f"expected a window of {spec.window_size} in {name!r}, got {window}")
    # Only a window evicts tokens, and never those within it; only a compression drops others.
    latest = first if window is None else (length - window).maximum(first)
    if shared:
        _check_pair(name, spec, tensors[PREFIX[0]], tensors[PREFIX[1]])
        lengths_of_prefixes = check_prefix(name, tensors, numbers, (stored, start))
        for kind in PREFIX:
            tensors[kind] = _cleared(tensors[kind], lengths_of_prefixes)
        latest = start
    for smaller, larger in ((stored, start), (start, length), (start, latest)):
        if max(smaller - larger) > 0:
            raise ValueError(
                f"expected stored <= start <= length in {name!r}, and a start that no token within the window of "
                f"{window} is before, got {stored}, {start}, {length}"
            )
    count = length - stored
    if key.shape[2] != max(count):
        raise ValueError(f"expected keys of {max(count)} tokens in {name!r}, got {key.shape[2]}")
    if kept:
        _check_kept(name, spec, tensors, KeptTokens(tensors[KEPT], first, end), length)
        if max(first - stored) > 0:
            raise ValueError(f"expected kept_first <= stored in {name!r}, got {first}, {stored}")
    cached = length if shared else length - start + start.minimum(sinks)
    _check_observed(name, spec, max(cached), tensors)
    if spec.max_length is not None and max(cached) > spec.max_length:
        raise ValueError(f"expected at most max_length={spec.max_length} tokens in {name!r}, got {max(cached)}")
    for kind in SELF[:2]:
        tensors[kind] = _cleared(tensors[kind], count)
    for kind in SELF[2:] if sinks else ():
        like = tensors[SELF[0] if kind == SELF[2] else SELF[1]]
        expected = [*like.shape[:2], sinks, like.shape[3]]
        if list(tensors[kind].shape) != expected or tensors[kind].dtype != like.dtype:
            raise ValueError(f"expected {kind} {expected} of {like.dtype} in {name!r}, got {_shown(tensors[kind])}")
        tensors[kind] = _cleared(tensors[kind], length)
    shortest = zip(names, (stored, start, length, *kept), strict=True)
    return {**numbers, **{each: list(number) for each, number in shortest}}


def _check_kept(name: str, spec: CacheSpec, tensors: Mapping[str, Tensor], kept: KeptTokens, length: Lengths) -> None:
    """Raises ValueError unless these are positions that a compression leaves, NO_TOKEN where a row has none."""
    key, (positions, first, end) = tensors[SELF[0]], kept
    count = end - first
    if min(count) < 0 or max(end - length) > 0:
        raise ValueError(f"expected kept_first <= kept_end <= length in {name!r}, got {first}, {end}, {length}")
    rows = zip(first.expand(key.shape[0]), end.expand(key.shape[0]), strict=True)
    if any((end and (first < spec.num_sinks or first == end)) or (first and not end) for first, end in rows):
        raise ValueError(f"expected kept tokens after the sinks, or 0, in {name!r}, got {first}, {end}")
    shape = [*key.shape[:2], max(count)]
    if list(positions.shape) != shape or positions.dtype != torch.int64:
        raise ValueError(f"expected {KEPT} {shape} of int64 in {name!r}, got {_shown(positions)}")
    column = torch.arange(max(count), device="cpu")
    there = (column < count.column()).unsqueeze(1)
    counted = (column + first.column()).unsqueeze(1)
    before = torch.cat((torch.full_like(positions[..., :1], spec.num_sinks - 1), positions[..., :-1]), 2)
    fits = ((positions > before) & (positions <= counted)).where(there, positions == NO_TOKEN)
    if not bool(fits.all()):
        raise ValueError(f"expected ascending positions before {max(end)} in {KEPT} of {name!r}, got others")


def _check_observed(name: str, spec: CacheSpec, cached: int, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless queries and summed weights are those of the cached tokens, where there are any."""
    batch, groups = tensors[SELF[0]].shape[:2]
    queries, weights = (tensors.get(kind) for kind in OBSERVED)
    if queries is not None:
        fits = queries.ndim == 4 and queries.shape[::3] == (batch, spec.head_dim) and queries.shape[1] % groups == 0
        if not fits or 0 in queries.shape or queries.dtype not in FLOATS:
            raise ValueError(f"expected {OBSERVED[0]} [{batch}, H, n, D] of floats in {name!r}, got {_shown(queries)}")
    if weights is not None and (list(weights.shape) != [batch, groups, cached] or weights.dtype not in FLOATS[:2]):
        raise ValueError(f"expected {OBSERVED[1]} [{batch}, {groups}, {cached}] in {name!r}, got {_shown(weights)}")


def _check_source(name: str, spec: CacheSpec, tensors: Mapping[str, Tensor]) -> None:
    key = tensors[CROSS[0]]
    _check_pair(name, spec, key, tensors[CROSS[1]])
    batch, _, tokens, _ = key.shape
    source, mask = tensors.get(CROSS[2]), tensors.get(CROSS[3])
    if source is not None and not (source.ndim == 3 and source.shape[:2] == (batch, tokens) and _is_float(source)):
        raise ValueError(f"expected {CROSS[2]} [{batch}, {tokens}, E] of floats in {name!r}, got {_shown(source)}")
    if mask is not None and not (mask.shape == (batch, tokens) and mask.dtype == torch.bool):
        raise ValueError(f"expected {CROSS[3]} [{batch}, {tokens}] of bool in {name!r}, got {_shown(mask)}")


def _check_pair(name: str, spec: CacheSpec, key: Tensor, value: Tensor) -> None:
    """Raises unless keys and values [B, G, L, D] are of one float dtype or, where they have codecs, records, with a row
    at least."""
    heads, names = spec.num_kv_heads, spec.cache_dtype or (None, None)
    for kind, tensor, codec in (("keys", key, names[0]), ("values", value, names[1])):
        width = spec.head_dim if codec is None else CODECS[codec].record_bytes(spec.head_dim)
        fits = tensor.ndim == 4 and tensor.shape[0] > 0 and (tensor.shape[1], tensor.shape[3]) == (heads, width)
        if not fits or not (_is_float(tensor) if codec is None else tensor.dtype == torch.uint8):
            what = "floats" if codec is None else f"bytes, as {codec} is stored,"
            raise ValueError(f"expected {kind} [B, {heads}, L, {width}] of {what} in {name!r}, got {_shown(tensor)}")
    if value.shape[:3] != key.shape[:3] or (names[0] == names[1] and value.dtype != key.dtype):
        raise ValueError(f"expected values as the keys, {_shown(key)}, in {name!r}, got {_shown(value)}")


def _plain(name: str, described: object, expected: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """The description itself, which must have exactly the expected names, each with a value of its kind."""
    if not isinstance(described, dict) or described.keys() != expected.keys():
        raise ValueError(f"expected {sorted(expected)} in {name!r}, got {reprlib.repr(described)}")
    for key, fits in expected.items():
        if not fits(described[key]):
            raise ValueError(f"expected another {key} in {name!r} than {reprlib.repr(described[key])}")
    return described


def _are_lengths(batch: int) -> Callable[[Any], bool]:
    """Whether a value is one number of tokens for all rows, or one for each."""

    def fits(value: object) -> bool:
        if not isinstance(value, list) or len(value) not in (1, batch):
            return False
        return all(type(number) is int and 0 <= number <= LONGEST_ROW for number in value)

    return fits


def _cleared(tensor: Tensor, count: Lengths) -> Tensor:
    """The tensor [B, G, L, D], with zeros after so many tokens of each row, where it may even contain NaN."""
    if min(count) >= tensor.shape[2]:
        return tensor
    unused = torch.arange(tensor.shape[2], device="cpu") >= count.column()
    return tensor.masked_fill(unused.to(tensor.device)[:, None, :, None], 0.0)


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS


def _shown(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"
