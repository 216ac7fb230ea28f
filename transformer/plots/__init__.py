"""Pictures with matplotlib (extra `plots`): attention weights, visibility, contents of a KV cache, bytes of caches.

Every function takes the `Axes` to draw into as `ax=`, makes a new figure without one, and returns the `Axes`. Nothing
else in the library imports this package; without matplotlib it can be imported, and its functions name the extra.
"""

from .attention import plot_attention, plot_visibility
from .cache import plot_cache
from .memory import plot_cache_bytes

__all__ = ["plot_attention", "plot_cache", "plot_cache_bytes", "plot_visibility"]
