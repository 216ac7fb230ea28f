"""The exceptions of the library: one base, and each also the built-in type that a caller would catch.

Every message names the argument, what was expected, what came and what to do about it. They are raised before anything
changes: the same call, put right, gives what it would have given at first.
"""


class AttentionError(Exception):
    """Base of every exception that this library raises on purpose."""


class ConfigurationError(AttentionError, ValueError):
    """A module or position scheme was built with options that cannot work."""


class ArgumentError(AttentionError, ValueError):
    """Arguments of one call that do not go together, or a value outside its range."""


class ShapeError(AttentionError, ValueError):
    """A tensor of the wrong rank, width, length, head count or batch."""


class DtypeError(AttentionError, TypeError):
    """A tensor of a dtype other than the module's, or than the cache's."""


class DeviceError(AttentionError, RuntimeError, ValueError):
    """A tensor on a device other than the module's, or than the cache's."""


class CacheFullError(AttentionError, RuntimeError, ValueError):
    """The call would hold more tokens than ``max_cache_length`` allows."""


class CacheStateError(AttentionError, RuntimeError, ValueError):
    """The cache is not in a state in which this call can be right (another length, a recompute inside backward)."""


class ConcurrentUseError(AttentionError, RuntimeError, ValueError):
    """A module that owns a cache was called while another call of it was still running."""


class FileFormatError(AttentionError, ValueError):
    """A file that is not of the expected format or version, or not as it was written."""


class ForeignFileError(AttentionError, FileExistsError):
    """A file would be written where something stands that this library did not write."""


class NonFiniteError(AttentionError, ArithmeticError, ValueError):
    """Logits with NaN or Inf among them, of which no token can be taken."""
