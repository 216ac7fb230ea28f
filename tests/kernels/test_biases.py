"""Biases: which queries see nothing."""

import torch

from transformer.kernels.biases import is_fully_masked


def test_a_fully_masked_query_has_no_key_and_no_sink() -> None:
    hidden = float("-inf")
    bias = torch.tensor([[hidden, 0.0], [hidden, hidden]])
    assert is_fully_masked(bias).tolist() == [[False], [True]]
    assert is_fully_masked(bias, torch.tensor([[hidden], [0.0]])).tolist() == [[False], [False]]
