"""Tensors of experts in a checkpoint: stacked when all are there, and named when one is missing or another shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints.folders import edit_tensors, small_model
from transformer.checkpoints import load_model, save_model
from transformer.errors import FileFormatError

NAME = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = small_model(feed_forward="mixture", num_experts=11, experts_per_token=2)
    save_model(model, tmp_path / "mixtral")
    return tmp_path / "mixtral"


@torch.no_grad()
def test_dtypes_of_experts(folder: Path) -> None:
    """One may be wider than the others; each in the wanted dtype, from two files too."""
    ids = torch.randint(11, (2, 5))
    whole = load_model(folder)
    edit_tensors(folder, lambda tensors: tensors.update({NAME.format(10): tensors[NAME.format(10)].double()}))
    assert torch.equal(load_model(folder, torch.float32)(ids), whole(ids))
    wide = load_model(folder)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    torch.testing.assert_close(wide(ids), whole(ids).double(), rtol=0, atol=1e-5)
    half = load_model(folder, torch.bfloat16).state_dict()
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in whole.state_dict().items())
    save_model(whole, folder.parent / "shards", shard_bytes=2000)
    assert torch.equal(load_model(folder.parent / "shards")(ids), whole(ids))


def test_experts_that_do_not_fit_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(NAME.format(10)))
    with pytest.raises(
        FileFormatError, match=r"experts.\{expert\}.w1.weight \[10, 12, 8\] .* instead of \[11, 12, 8\]"
    ):
        load_model(folder)
    edit_tensors(folder, lambda tensors: tensors.pop(NAME.format(4)))
    with pytest.raises(
        FileFormatError, match=r"missing: .*experts.\{expert\}.w1.weight; unknown: .*experts.0.w1.weight"
    ):
        load_model(folder)
