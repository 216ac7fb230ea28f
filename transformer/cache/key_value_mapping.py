"""Mapping of one layer's cached keys and values, and the figures that can be read of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..codecs import CodecNames
from ..deprecation import warn_old
from ..tracing import is_compiling
from .cross_kv import CrossKV
from .elsewhere import HasContents
from .lengths import Lengths
from .spec import CacheSpec
from .static_layout import StaticLayout, compiled_layout


class KeyValueMapping(HasContents, Mapping[str, Tensor]):
    """Exactly `'key'` and `'value'`, each [B, G, cached_length, D] in order of position, of `contents`."""

    spec: CacheSpec

    def __getitem__(self, name: str) -> Tensor:
        if name not in ("key", "value"):
            raise KeyError(name)
        shown = self.contents.in_order(values=name == "value")
        if shown is not None:
            return shown
        return torch.empty(0, self.num_kv_heads, 0, self.head_dim, dtype=torch.float32, device="cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(("key", "value"))

    def __len__(self) -> int:
        return 2

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    # --- the specification ------------------------------------------------------------------------------------------

    @property
    def num_kv_heads(self) -> int:
        """`G`."""
        return self.spec.num_kv_heads

    @property
    def head_dim(self) -> int:
        """`D`."""
        return self.spec.head_dim

    @property
    def num_sinks(self) -> int:
        """As in the module."""
        return self.spec.num_sinks

    @property
    def window_size(self) -> int | None:
        """As in the module."""
        return self.spec.window_size

    @property
    def max_length(self) -> int | None:
        """The most tokens that may be cached."""
        return self.spec.max_length

    @property
    def cache_dtype(self) -> CodecNames | None:
        """The names of the codecs by which keys and values are stored; None: numbers as they come."""
        return self.spec.cache_dtype

    @property
    def position(self) -> str | None:
        """How the module's position scheme describes itself; None where it is not known."""
        return self.spec.position

    @property
    def options(self) -> dict[str, Any]:
        """Deprecated name of `spec`, as a dict."""
        warn_old("LayerCache.options", "LayerCache.spec")
        return self.spec.fields()

    # --- the contents -----------------------------------------------------------------------------------------------

    @property
    def row_lengths(self) -> Lengths:
        """How many tokens each row has seen: one entry where all rows are equal."""
        return self.figures.row_lengths

    @property
    def row_cached_lengths(self) -> Lengths:
        """How many tokens of each row are cached: one entry where all rows are equal."""
        return self.figures.row_cached_lengths

    @property
    def window(self) -> int | None:
        """The window that the first sliding call fixed; None before it."""
        return None if self.contents.state is None else self.contents.state.window

    @property
    def source(self) -> CrossKV | None:
        """The projected source of cross-attention, where there is one."""
        return self.contents.source

    @property
    def static(self) -> StaticLayout | None:
        """The frozen layout that a step which is being compiled reads and writes; None in any other step."""
        if self._elsewhere is not None:
            return None
        return compiled_layout(self.contents.state)

    @property
    def static_source(self) -> CrossKV | None:
        """The source that was there when the layout was frozen, while a step is compiled; None at any other time."""
        if self._static_source is None:
            return None
        kept = self.contents.source
        return kept if kept is self._static_source and is_compiling() else None
