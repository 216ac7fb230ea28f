"""Thresholds: replaced for a block, each with a date and a benchmark, and aware of the number of threads."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transformer.errors import ConfigurationError
from transformer.kernels import Kernel, Tuning, tuned, tuning
from transformer.kernels.tuning import DEFAULT

ROOT = Path(__file__).resolve().parents[2]


def documented() -> dict[str, str]:
    """The text under each field of `Tuning`."""
    tree = ast.parse(Path(tuning.__file__).read_text("utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
    return {
        field.target.id: text.value.value
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


@pytest.mark.parametrize("name", [*vars(DEFAULT)])
def test_each_threshold_says_what_it_limits_where_and_when(name: str) -> None:
    text = " ".join(documented()[name].split())
    assert re.search(r"\b(rows|keys|bytes|numbers|weights|parts|threads|slices|queries)\b", text, re.IGNORECASE)
    machine, date = r"\b(EPYC|Xeon|H200)\b", r"\b\d{4}-\d\d-\d\d\b"
    assert re.search(f"{machine}.*{date}|{date}.*{machine}", text)


@pytest.mark.parametrize("name", [*vars(DEFAULT)])
def test_each_threshold_names_its_benchmark(name: str) -> None:
    command = (ROOT / "benchmarks" / "__main__.py").read_text("utf-8")
    text = " ".join(documented()[name].split())
    named = re.findall(r"`python -m benchmarks (\w+)(?: --threads 1)?`", text)
    of_a_card = re.findall(r"`python -m benchmarks\.gpu (\w+)`", text)
    assert named or of_a_card
    parts = (ROOT / "benchmarks" / "gpu.py").read_text("utf-8")
    assert not [each for each in of_a_card if f'"{each}": {each}' not in parts], "no part of the grid of a card"
    assert not [each for each in named if f'"{each}": {each}.' not in command], "no kind of the benchmarks"


@pytest.mark.parametrize(
    "changes",
    [{"linear_slices": 0}, {"split_kv_parts": 0}, {"min_prefix": "a"}, {"max_norm_rows": -1}, {"tile_bytes": True}],
)
def test_numbers_that_no_kernel_can_use_are_refused(changes: dict[str, object]) -> None:
    (name,) = changes
    with pytest.raises(ConfigurationError, match=f"^{name}: expected"), tuned(**changes):
        raise RuntimeError("not reached")
    assert tuning.active is DEFAULT


def test_replaced_within_a_block() -> None:
    with tuned(min_matmul_keys=5, linear_slices=2) as inner:
        assert tuning.active is inner
        assert (inner.min_matmul_keys, inner.linear_slices) == (5, 2)
        with tuned(min_matmul_keys=6) as innermost:
            assert (innermost.min_matmul_keys, innermost.linear_slices) == (6, 2)
        with pytest.raises(ZeroDivisionError), tuned(min_matmul_keys=7):
            raise ZeroDivisionError
        assert tuning.active is inner
    assert tuning.active is DEFAULT == Tuning()
    with pytest.raises(TypeError, match="no_such"), tuned(no_such=1):
        pass


def test_a_compiled_call_follows_new_thresholds() -> None:
    torch._dynamo.reset()
    graphs: list[str] = []

    def recording(graph, _inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    kernel, query, key = Kernel(0.3), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8)
    compiled = torch.compile(lambda: kernel(query, key, key)[0], fullgraph=True, backend=recording)
    with torch.no_grad():
        compiled()
        with tuned(min_matmul_keys=9):
            compiled()
    assert ["scaled_dot_product" in graph for graph in graphs] == [True, False]


class Operators(TorchDispatchMode):
    """The names of the operators that ran, with the shape of their first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append((func.name(), tuple(args[0].shape) if args and isinstance(args[0], torch.Tensor) else ()))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("number", [1, 2])
@torch.no_grad()
def test_keys_are_split_for_several_threads_alone(number: int) -> None:
    torch.set_num_threads(number)
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 1, DEFAULT.min_split_keys, 8)
    with Operators() as operators:
        Kernel(0.3)(query, key, key)
    split = ("aten::_scaled_dot_product_flash_attention_for_cpu", (1, DEFAULT.split_kv_parts, 4, 8))
    assert (split in operators.ran) == (number > 1)
