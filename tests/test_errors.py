"""Exceptions: each has the library's base, and the built-in type that a caller would catch."""

import inspect

import pytest

from transformer import errors

BUILT_IN = {
    errors.ConfigurationError: ValueError,
    errors.ArgumentError: ValueError,
    errors.ShapeError: ValueError,
    errors.DtypeError: TypeError,
    errors.DeviceError: RuntimeError,
    errors.CacheFullError: RuntimeError,
    errors.CacheStateError: RuntimeError,
    errors.ConcurrentUseError: RuntimeError,
    errors.FileFormatError: ValueError,
    errors.ForeignFileError: FileExistsError,
    errors.RanksError: (RuntimeError,),
    errors.NonFiniteError: ArithmeticError,
}


@pytest.mark.parametrize("error", BUILT_IN)
def test_catches_as_the_base_and_as_the_built_in(error: type[errors.AttentionError]) -> None:
    assert issubclass(error, errors.AttentionError)
    assert issubclass(error, BUILT_IN[error])
    assert error.__doc__


def test_the_table_is_complete() -> None:
    classes = (value for _, value in inspect.getmembers(errors, inspect.isclass))
    defined = {each for each in classes if each.__module__ == errors.__name__}
    assert defined == {errors.AttentionError, *BUILT_IN}
