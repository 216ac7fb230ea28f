"""A layer's cache within one call: the contents as the call found them, and those that it will publish."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import encoded
from .append import appended, appends_beside_prefix, whole_before
from .append_uniform import append_uniform
from .contents import CacheContents
from .holder import CacheSlot
from .key_value_view import KeyValueView
from .layer import LayerCache
from .lease import Attribute, exchange
from .state import SelfAttentionState, check_continues, check_room, check_unrecorded
from .step import Step

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class CachedLayer:
    """A layer's cache in one call: as the call found it, and `contents`, which it will hold after the call."""

    slot: CacheSlot
    cache: LayerCache
    before: CacheContents
    contents: CacheContents

    @classmethod
    def of(cls, slot: CacheSlot, cache: LayerCache) -> "CachedLayer":
        """A cache as it is now."""
        contents = cache.contents
        return cls(slot, cache, contents, contents)

    @property
    def changed(self) -> bool:
        """True if the call has written something."""
        return self.contents is not self.before

    def append(
        self, key: Tensor, value: Tensor, step: Step, *, beside_prefix: bool = False
    ) -> tuple[KeyValueView, CacheContents]:
        """The keys and values that the queries of `step` may look at, and the contents after its new keys and values
        [B, G, width, D]; nothing is visible in the cache yet.

        Rows that share a prefix get it back whole, unless the caller says that it attends `beside_prefix`, which the
        view then has apart.

        Raises CacheFullError past `max_length`; ShapeError, DtypeError, DeviceError or CacheStateError where the tokens
        or the step do not continue what is cached.
        """
        spec, contents, done = self.cache.spec, self.contents, None
        if spec.cache_dtype is not None:
            return self._append_records(key, value, step, beside_prefix)
        state = contents.state
        if isinstance(state, SelfAttentionState) and (beside_prefix or state.prefix is None):
            done = append_uniform(state, key, value, step, spec)
        if done is None:
            state, contents = self._checked(key, step, beside_prefix)
            done = appended(state, key, value, step, spec, contents.reserved)
        view, state = done
        return view, CacheContents(state, contents.source, contents.reserved, contents.may_share)

    def _checked(self, key: Tensor, step: Step, beside_prefix: bool) -> tuple[SelfAttentionState, CacheContents]:
        """The state that new keys [B, G, width, D] follow, without a prefix where this call cannot keep one, and the
        contents that go with it. Raises as `append`."""
        spec, contents = self.cache.spec, self.contents
        state = contents.ordered_state
        if state is None:
            state = SelfAttentionState.empty(key, spec.num_sinks, spec.coding(key.dtype))
        check_continues(state, key, step)
        if state.prefix is not None and not (beside_prefix and appends_beside_prefix(step)):
            state, contents = whole_before(state, step, spec), contents._replace(may_share=False)
        if spec.max_length is not None:
            check_room(state, step, spec.max_length)
        return state, contents

    def _append_records(
        self, key: Tensor, value: Tensor, step: Step, beside_prefix: bool
    ) -> tuple[KeyValueView, CacheContents]:
        """The same where the cache has codecs: the view is one of records, the new tokens' among them, so that a query
        reads the same numbers in whatever call they came.

        Raises CacheStateError where gradients are recorded, which records cannot carry.
        """
        spec = self.cache.spec
        check_unrecorded(key, value)
        with torch.no_grad():
            state, contents = self._checked(key, step, beside_prefix)
            coding = state.buffers.coding
            if coding is None:
                raise RuntimeError("append: expected buffers of records in a cache with codecs")
            records = encoded(coding, key, value)
            done = append_uniform(state, *records, step, spec)
            view, state = appended(state, *records, step, spec, contents.reserved) if done is None else done
        contents = CacheContents(state, contents.source, contents.reserved, contents.may_share)
        return view._replace(coding=coding), contents

    def publish_into(self, expected: list[Attribute], changes: list[Attribute]) -> None:
        """Adds what must not have changed since the call found it, and what publishing sets."""
        slot, cache, before, contents = self.slot, self.cache, self.before, self.contents
        if slot.cache is None:
            expected.append((slot, "cache", None))
            changes.append((slot, "cache", cache))
        else:
            expected += ((slot, "cache", cache), (cache, "contents", before))
        changes.append((cache, "contents", contents))
        state, source = contents.state, contents.source
        if source is not None and source is not before.source:
            logger.debug("source kept: %d tokens, %d bytes", source.key.shape[2], source.nbytes)
        if state is None or state is before.state or not isinstance(state, SelfAttentionState):
            return
        # A state that only counts its tokens anew has written nothing, and may not be the one that appends.
        written = not isinstance(before.state, SelfAttentionState) or state.version is not before.state.version
        if written and state.buffers.lease is not None:
            changes += state.buffers.lease.renew(state.version)

    def publish(self) -> None:
        """Publishes this layer alone. Raises ConcurrentUseError, and then nothing is published."""
        expected: list[Attribute] = []
        changes: list[Attribute] = []
        self.publish_into(expected, changes)
        exchange(expected, changes)
