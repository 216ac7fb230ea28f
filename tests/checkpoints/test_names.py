"""Layouts of stored tensors: every part of every tensor of the model is found in the tensor that `join` makes."""

from __future__ import annotations

import pytest
import torch

from transformer.checkpoints.names import Stored


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shares", "groups"), [((1,), 1), ((4, 1, 1), 1), ((1, 1, 1), 2), ((2, 1, 1), 3)])
def test_parts_of_joined_tensors(shares: tuple[int, ...], groups: int, transposed: bool) -> None:
    for inner in ((), (3,)):
        tensors = [torch.randn(2 * groups * share, *inner) for share in shares]
        layouts = [Stored("", transposed, part, shares, groups) for part in range(len(shares))]
        joined = layouts[0].join(tensors)
        for layout, tensor in zip(layouts, tensors, strict=True):
            rows = len(tensor)
            assert joined.shape == layout.shape(tensor.shape)
            for begin in range(rows + 1):
                for end in range(begin, rows + 1):
                    part = (slice(begin, end), *(slice(1, 3) for _ in inner))
                    found = layout.turned(joined[layout.region(part, rows)], part, rows)
                    assert torch.equal(found, tensor[part])
