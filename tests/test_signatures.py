"""Decorators of signatures: what a decorated function does, and what it says of itself."""

import inspect
import pickle
from dataclasses import InitVar, dataclass
from typing import get_type_hints

import pytest

from transformer.signatures import arguments_of, configured_by, typed_as


@dataclass(frozen=True)
class Shape:
    width: int
    depth: int = 2
    doubled: InitVar[bool] = False

    def __post_init__(self, doubled: bool) -> None:
        if doubled:
            object.__setattr__(self, "width", 2 * self.width)


class Model:
    @configured_by(Shape)
    def __init__(self, config: Shape) -> None:
        """Builds it."""
        self.config = config


class Deeper(Model):
    def __init__(self, width: int) -> None:
        super().__init__(width, depth=9)


@arguments_of(Shape)
def area(width: int, depth: int = 2, **options: object) -> int:
    return Shape(width, depth, **options).width * depth


def test_a_constructor_is_called_with_the_arguments_of_the_configuration() -> None:
    assert Model(3).config == Model(width=3, depth=2).config == Shape(3)
    assert Model(3, doubled=True).config == Shape(6)
    assert Deeper(4).config == Shape(4, 9)
    assert pickle.loads(pickle.dumps(Model(3))).config == Shape(3)


def test_a_constructor_refuses_what_the_configuration_refuses() -> None:
    for arguments, options in (((), {}), ((1, 2, True, 4), {}), ((1,), {"hight": 3})):
        with pytest.raises(TypeError, match=r"Shape\.__init__"):
            Model(*arguments, **options)


def test_signatures_show_each_argument_with_its_type_and_default() -> None:
    assert inspect.signature(Model).parameters.keys() == inspect.signature(Shape).parameters.keys()
    assert Model.__init__.__doc__ == "Builds it."
    assert inspect.signature(Model).parameters["depth"].default == 2
    assert inspect.signature(area).parameters == inspect.signature(Model).parameters
    types = {"width": int, "depth": int, "doubled": bool}
    assert get_type_hints(Model.__init__) == types | {"return": type(None)}
    assert get_type_hints(area) == types | {"return": int}
    assert area(3, doubled=True) == 12


def test_a_method_typed_as_another_is_the_same_method() -> None:
    def method(self: object) -> None: ...

    assert typed_as(area)(method) is method
