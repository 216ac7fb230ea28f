"""Equality of one call of an attention module with blocks of it, rows apart, and calls over its cache."""

from __future__ import annotations

import torch
from torch import nn

from tests.conversations import assert_same, run_chunks
from tests.setups import padding, tokens
from transformer.kernels import tuned


def assert_splits_change_nothing(module: nn.Module) -> None:
    """What a float32 module of width 16 computes in blocks, from a cache, or of padded rows equals one call that forms
    all weights."""
    x, mask = tokens(2, 300, 16, dtype=torch.float32), padding([(0, 300), (20, 280)], 300)
    for each in (mask, None):
        module.use_kv_cache = False
        whole, _ = module(x, attention_mask=each, return_weights=True)
        for rows in (0, 1000):
            with tuned(min_row_tokens=rows):  # row by row, and all rows at once
                assert_same(module(x, attention_mask=each), whole, 2e-6)
        module.use_kv_cache, module.kv_cache = True, None
        assert_same(run_chunks(module, x, (1, 280, 1, 18), mask=each), whole, 2e-6)
