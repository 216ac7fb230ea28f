"""The seeds, threads and hypothesis profile of the test suite, for the stages as well."""

from tests.conftest import _seeded

__all__ = ["_seeded"]
