"""KV cache of one attention layer: its own tokens, and the projected source of cross-attention."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from ..errors import ArgumentError
from . import files
from .contents import CacheContents
from .layer_operations import LayerOperations
from .snapshot import Snapshot, from_snapshot, snapshot_of
from .spec import CacheSpec


class LayerCache(LayerOperations):
    """Keys and values that one attention module has cached; `module.kv_cache` is one of these.

    A mapping with exactly `'key'` and `'value'`, each [B, G, cached_length, D] in order of position, to be read: views
    where rows are equal and no sink is evicted. Rows of different lengths are left-aligned and zero-filled. For a
    module that has only done cross-attention they are the projected source.

    Args:
        num_kv_heads, head_dim, num_sinks, window_size, max_length, position: see `CacheSpec`, which they make.

    Its whole state is one immutable value, `contents`, rebound last: a call that raises leaves the cache as it was.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_sinks: int = 0,
        window_size: int | None = None,
        max_length: int | None = None,
        position: str | None = None,
    ) -> None:
        self.spec = CacheSpec(
            num_kv_heads,
            head_dim,
            num_sinks=num_sinks,
            window_size=window_size,
            max_length=max_length,
            position=position,
        )
        self.contents = CacheContents()
        self._static_source = None

    @classmethod
    def of(cls, spec: CacheSpec, contents: CacheContents | None = None) -> "LayerCache":
        """A cache of this specification; with contents that no other cache writes to, or empty."""
        cache = cls(**spec.fields())
        if contents is not None:
            cache.contents = contents
        return cache

    def holding(self, contents: CacheContents) -> "LayerCache":
        """A view of other contents by the same specification."""
        return LayerCache.of(self.spec, contents)

    # --- conversations ----------------------------------------------------------------------------------------------

    def fork(self) -> "LayerCache":
        """A second conversation that begins with all that this one has seen. It costs nothing until one side writes."""
        return LayerCache.of(self.spec, self.contents.forked())

    @classmethod
    def join(cls, caches: "Sequence[LayerCache]") -> "LayerCache":
        """The rows of all caches in one running batch, each with its own length; they themselves stay as they are.

        Raises ArgumentError, DtypeError or DeviceError where they cannot stand in one batch.
        """
        if not caches:
            raise ArgumentError("caches: expected at least one, got none")
        first = caches[0]
        for cache in caches:
            if cache.spec != first.spec:
                raise ArgumentError(f"caches: expected all to be of {first.spec}, as the first, got {cache.spec}")
            if cache.contents.kinds != first.contents.kinds:
                raise ArgumentError("caches: expected all to have seen tokens, or all a source, got one that has not")
        return cls.of(first.spec, CacheContents.side_by_side([cache.contents for cache in caches], first.spec))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the conversation into one safetensors file, whole or not at all; see `KVCache.save`."""
        files.write(path, files.SavedCache({"": (self.spec, snapshot_of(self.contents))}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "LayerCache":
        """The conversation in a file that `save` of one layer wrote; raises as `KVCache.load`."""
        return cls.from_snapshot(*files.read_one(path))

    @classmethod
    def from_snapshot(cls, spec: CacheSpec, snapshot: Snapshot) -> "LayerCache":
        """A cache with the contents of a snapshot, whose tensors are its own from now on."""
        return cls.of(spec, from_snapshot(snapshot))

    # --- copies -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerCache":
        copy = memo[id(self)] = LayerCache.from_snapshot(self.spec, snapshot_of(self.contents))
        return copy

    def __getstate__(self) -> tuple[dict[str, Any], Snapshot]:
        return self.spec.fields(), snapshot_of(self.contents)

    def __setstate__(self, saved: tuple[dict[str, Any], Snapshot]) -> None:
        LayerCache.__init__(self, **saved[0])
        self.contents = from_snapshot(saved[1])
