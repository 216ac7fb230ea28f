"""Cost of a prefill over a window: linear time and memory, without repeated keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens


class Allocations(TorchDispatchMode):
    """Notes the bytes of every buffer that an operation makes: the largest one, and all together.

    Views share their source's buffer, so an expanded view counts for nothing and a copied one for all it
    takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in given:
                    self.largest = max(self.largest, storage.nbytes())
                    self.total += storage.nbytes()
        return result


def measure(options: Options, length: int, padded: bool, grad: bool, weights: bool = False) -> Allocations:
    module = build(options, dtype=torch.float32)
    x = tokens(2, length, options.embed_dim, dtype=torch.float32)
    # Columns of the same position lie half a chunk apart in the two rows.
    mask = padding([(0, length // 2), (length // 2, length // 2)], length) if padded else None
    with torch.set_grad_enabled(grad), Allocations() as noted:
        module(x, None, False, attention_mask=mask, return_weights=weights)
    return noted


def test_the_measure_sees_a_square() -> None:
    """The check checked: asking for the weights of all pairs does make an L x L buffer."""
    noted = measure(Options(window_size=16), 512, padded=False, grad=False, weights=True)
    assert noted.largest >= 512 * 512 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cached", "grad"),
    [(False, False), (True, False), (True, True)],
    ids=["plain", "cached", "cached, with gradients"],
)
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("scheme", ["none", "rotary halves", "alibi", "t5 causal"])
def test_windowed_prefill_is_linear(scheme: str, sinks: int, cached: bool, grad: bool) -> None:
    options = Options(num_groups=2, window_size=16, num_sinks=sinks, cached=cached, scheme=SCHEMES[scheme])
    for padded in (False, True):
        short = measure(options, 512, padded, grad)
        long = measure(options, 1024, padded, grad)
        assert long.largest < 1024 * 1024, "not even one byte for each pair"
        assert long.largest <= 2.2 * short.largest
        assert long.total <= 2.2 * short.total


@pytest.mark.parametrize("scheme", ["none", "alibi"])
def test_windowed_prefill_without_causality_is_linear(scheme: str) -> None:
    options = Options(window_size=16, causal=False, cached=False, scheme=SCHEMES[scheme])
    short = measure(options, 512, padded=False, grad=False)
    long = measure(options, 1024, padded=False, grad=False)
    assert long.largest < 1024 * 1024
    assert long.total <= 2.2 * short.total


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("scheme", ["none", "rotary halves", "alibi"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("length", [1, 16])
def test_a_step_never_repeats_the_keys(
    length: int, scheme: str, window: int | None, softcap: float | None, grad: bool
) -> None:
    """Eight query heads share one key head: repeated keys would be eight times the held ones."""
    options = Options(
        embed_dim=32,
        num_heads=8,
        num_groups=1,
        head_dim=64,
        window_size=window,
        softcap=softcap,
        scheme=SCHEMES[scheme],
    )
    module = build(options, dtype=torch.float32)
    with torch.no_grad():
        module(tokens(2, 512, 32, dtype=torch.float32))
    keys = 2 * 512 * 64 * 4
    with torch.set_grad_enabled(grad), Allocations() as noted:
        module(tokens(2, length, 32, dtype=torch.float32))
    # Growth may double the buffer of keys and values together; the scores take twice the keys at the most.
    assert noted.largest < 6 * keys
