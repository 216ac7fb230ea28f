"""Compositions of this library inside other engines: transformers, vLLM, and exported programs.

Needs the extra `engines`. Importing it registers the classes with transformers' Auto classes.
"""

from ..extras import missing

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise missing("engines", "transformer.engines", error) from error
