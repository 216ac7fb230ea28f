"""Constants of a scheme: on all devices that use them, and unchanged by casts of the module."""

from __future__ import annotations

import copy
import pickle

import torch

from tests.internals import copies
from transformer.positions import RotaryEmbedding
from transformer.positions.constant import Constant

META = torch.device("meta")


def test_a_device_that_has_asked_has_its_copy() -> None:
    numbers = Constant(lambda: torch.arange(3.0))
    assert torch.equal(numbers.on(torch.device("cpu")), torch.arange(3.0))
    there = numbers.on(META)
    assert there.device == META
    assert numbers.on(META) is there


def test_copies_made_in_inference_mode_can_be_learnt_through() -> None:
    numbers = Constant(lambda: torch.arange(3.0))
    with torch.inference_mode():
        assert not numbers.on(META).is_inference()


def test_a_copy_or_a_file_has_the_numbers_alone() -> None:
    numbers = Constant(lambda: torch.arange(3.0))
    numbers.on(META)
    for other in (copy.deepcopy(numbers), pickle.loads(pickle.dumps(numbers))):
        assert torch.equal(other.on(torch.device("cpu")), torch.arange(3.0))
        assert len(copies(other)) == 1


def test_neither_a_cast_nor_a_detour_over_meta_touches_them() -> None:
    positions = torch.tensor([[4_000_001]])
    exact, rotary = RotaryEmbedding(8).table(positions), RotaryEmbedding(8)
    rotary.table(positions, torch.empty(0, device=META))
    rotary.to("meta").to_empty(device="cpu").half()
    assert torch.equal(rotary.table(positions).cos, exact.cos)
