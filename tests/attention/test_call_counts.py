"""Cost of one decode step in calls of functions of this package, where small models spend their time.

Counted on any machine: `sys.setprofile` "call" events of frames under `transformer/`, in a warm step.
"""

from __future__ import annotations

import ast
import sys

import pytest
import torch

from tests.counting import PACKAGE, calls_by_file
from tests.internals import without_compiled_kernels
from transformer import DecoderOnlyTransformer, GroupQueryAttention
from transformer.kernels.compiled import are_available
from transformer.positions import RotaryEmbedding

MODULE_CALLS, MODEL_CALLS = 52, 295
MODULE_FILES = {"compiled": 16, "PyTorch": 15}
"""With compiled kernels, of which the rotation has a file of its own, and without numba, as on a card."""

MOST_POSITIONAL = 7
PACKAGES_OF_CALLS = "attention", "cache", "kernels"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="comprehensions are no calls there, so other bars would hold")
@pytest.mark.parametrize("kernels", MODULE_FILES)
@torch.inference_mode()
def test_a_step_of_a_module(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "PyTorch":
        without_compiled_kernels(monkeypatch)
    elif not are_available():
        pytest.skip("numba is missing, or turned off")
    module = GroupQueryAttention(64, 4, 2, True, True, position=RotaryEmbedding(16))
    module(torch.randn(1, 5, 64))
    x = torch.randn(1, 1, 64)
    module(x)
    counted = calls_by_file(lambda: module(x))
    assert counted.total() <= MODULE_CALLS, counted
    assert len(counted) <= MODULE_FILES[kernels], counted


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="comprehensions are no calls there, so other bars would hold")
@pytest.mark.parametrize("kernels", MODULE_FILES)
@torch.inference_mode()
def test_a_step_of_a_model(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "PyTorch":
        without_compiled_kernels(monkeypatch)
    elif not are_available():
        pytest.skip("numba is missing, or turned off")
    model = DecoderOnlyTransformer(100, 64, 4, 128, 4, attention="gqa", num_groups=2).eval().enable_cache()
    model(torch.randint(100, (1, 5)))
    ids = torch.randint(100, (1, 1))
    model(ids)
    counted = calls_by_file(lambda: model(ids))
    assert counted.total() <= MODEL_CALLS, counted


def long_signatures(source: str) -> list[str]:
    """Functions that take more than `MOST_POSITIONAL` arguments by position, `self` aside."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        if len(names) - (names[:1] in (["self"], ["cls"])) > MOST_POSITIONAL:
            found.append(node.name)
    return found


def long_calls(source: str) -> list[str]:
    """Calls that give more than `MOST_POSITIONAL` arguments by position, those of a written-out tuple included."""
    tree = ast.parse(source)
    tuples = {
        target.id: len(node.value.elts)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def count(argument: ast.expr) -> int:
        if not isinstance(argument, ast.Starred):
            return 1
        if isinstance(argument.value, ast.Tuple):
            return len(argument.value.elts)
        return tuples.get(argument.value.id, 1) if isinstance(argument.value, ast.Name) else 1

    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [ast.unparse(call.func) for call in calls if sum(map(count, call.args)) > MOST_POSITIONAL]


def test_no_function_takes_a_row_of_arguments_by_position() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    found = {str(path): names for path in files if (names := long_signatures(path.read_text(encoding="utf-8")))}
    assert not found
    assert long_signatures("def f(self, a, b, c, d, e, f, g, h): ...") == ["f"], "the test can fail"
    assert long_signatures("def f(self, a, b, c, d, e, f, g, *, h): ...") == []


def test_no_call_gives_a_row_of_arguments_by_position() -> None:
    files = sorted(path for package in PACKAGES_OF_CALLS for path in (PACKAGE / package).rglob("*.py"))
    found = {str(path): names for path in files if (names := long_calls(path.read_text(encoding="utf-8")))}
    assert files
    assert not found
    assert long_calls("Call(a, b, c, d, e, f, g, h)") == ["Call"], "the test can fail"
    assert long_calls("o = d, e, f, g, h\nCall(a, b, c, *o)") == ["Call"]
    assert long_calls("Call(a, b, c, d, e, f, g, h=h)\nCall(*many)") == []
