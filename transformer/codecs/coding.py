"""Coding: which codecs the keys and the values of a cache have, and what `cache_dtype=` may say of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ArgumentError, shown
from .codec import Codec
from .floats import FloatCodec
from .int4 import Int4Codec
from .scaled import ScaledCodec

_ALL: tuple[Codec, ...] = (
    FloatCodec(torch.float32),
    FloatCodec(torch.float16),
    FloatCodec(torch.bfloat16),
    ScaledCodec(torch.float8_e4m3fn, 448.0),
    ScaledCodec(torch.int8, 127.0),
    Int4Codec(),
)

CODECS: Mapping[str, Codec] = {codec.name: codec for codec in _ALL}
"""Every codec, by its name."""

CacheDtype = torch.dtype | str | None
"""One of `cache_dtype=`: a dtype, its name, or "int4"; None: as the weights."""

CacheDtypes = CacheDtype | tuple[CacheDtype, CacheDtype]
"""What `cache_dtype=` may be: one for both, or a pair for keys and values."""

CodecNames = tuple[str | None, str | None]
"""The names of the codecs of keys and values; None: numbers as they come."""


@dataclass(frozen=True, slots=True)
class Coding:
    """The codecs of keys and values of `head_dim` numbers, which come in and are read in `dtype`."""

    key: Codec | None
    value: Codec | None
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, names: CodecNames, head_dim: int, dtype: torch.dtype) -> "Coding":
        """The coding by the names of its codecs."""
        key, value = (None if name is None else CODECS[name] for name in names)
        return cls(key, value, head_dim, dtype)

    def encoded(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., D] as they are stored."""
        key = key if self.key is None else self.key.encode(key)
        return key, value if self.value is None else self.value.encode(value)

    def decoded(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stored keys and values as the numbers [..., D] that attention reads."""
        return self.decoded_key(key), self.decoded_value(value)

    def decoded_key(self, stored: Tensor) -> Tensor:
        """Stored keys as numbers [..., D]."""
        return stored if self.key is None else self.key.decode(stored, self.head_dim, self.dtype)

    def decoded_value(self, stored: Tensor) -> Tensor:
        """Stored values as numbers [..., D]."""
        return stored if self.value is None else self.value.decode(stored, self.head_dim, self.dtype)

    def read_as(self, dtype: torch.dtype) -> "Coding":
        """The same records, read in another dtype."""
        return replace(self, dtype=dtype)


def codec_names(cache_dtype: CacheDtypes) -> CodecNames | None:
    """The codecs that an option `cache_dtype` asks for; None where numbers are kept as they come.

    Raises ArgumentError for anything but None, a dtype or name of one, or a pair of these for keys and values.
    """
    if isinstance(cache_dtype, tuple | list) and len(cache_dtype) == 2:
        names = _name(cache_dtype[0]), _name(cache_dtype[1])
    else:
        names = (_name(cache_dtype),) * 2
    return None if names == (None, None) else names


def _name(cache_dtype: object) -> str | None:
    if cache_dtype is None:
        return None
    name = str(cache_dtype).removeprefix("torch.") if isinstance(cache_dtype, torch.dtype) else cache_dtype
    if isinstance(name, str) and name in CODECS:
        return name
    raise ArgumentError(
        f"cache_dtype: expected None, one of {', '.join(map(repr, CODECS))}, the torch.dtype of that name, or a pair "
        f"of these for keys and values, got {shown(cache_dtype)}"
    )
