"""Generation for any module with a forward: with caches, without caches, and with "auto"."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.blocks.stacks import make
from tests.models.variants import ids
from transformer.errors import ArgumentError
from transformer.generation import ForwardAdapter, generate, stream


class Plain(nn.Module):
    """A user's own model, around a stack of blocks."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 16, dtype=torch.float64)
        self.stack = make(cached=cached)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.stack(self.embedding(tokens), attention_mask=attention_mask) @ self.embedding.weight.T


def plain(cached: bool) -> Plain:
    torch.manual_seed(0)
    return Plain(cached).eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0}])
def test_a_model_of_ones_own(options: dict[str, object]) -> None:
    prompt, real = ids(2, 4, 9), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    given = {"max_new_tokens": 5, **options}

    def written(model: Plain, **more: object) -> Tensor:
        return generate(model, prompt, real, generator=torch.Generator().manual_seed(0), **given, **more)

    expected = written(plain(False), use_cache=False)
    assert torch.equal(written(plain(False), use_cache="auto"), expected)
    with_caches = plain(True)
    assert torch.equal(written(with_caches, use_cache=False), expected)
    assert all(block.attention.kv_cache is None and block.attention.use_kv_cache for block in with_caches.stack.blocks)
    assert torch.equal(written(with_caches), expected)
    assert with_caches.stack.blocks[0].attention.kv_cache.length == 9
    assert torch.equal(written(ForwardAdapter(plain(True))), expected)
    assert expected.shape == (2, 5)


def test_a_model_without_caches_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^use_cache: expected a model with caches"):
        stream(plain(False), ids(1, 2, 9), max_new_tokens=2)
    with pytest.raises(ArgumentError, match=r"^use_cache: expected attention modules .* got Linear, which has none"):
        stream(nn.Linear(2, 2), ids(1, 2, 9), max_new_tokens=2)


def test_logits_of_the_smallest_numbers_are_finite() -> None:
    """A model may hide tokens behind the least number that there is; two of them sum to infinity."""

    class Hiding(nn.Module):
        def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            logits = torch.full((*tokens.shape, 5), torch.finfo(torch.float32).min)
            logits[..., 2] = 1.0
            return logits

    for options in ({}, {"temperature": 1.0}, {"temperature": 0.1, "repetition_penalty": 3.0}):
        assert generate(Hiding(), ids(1, 2, 5), max_new_tokens=3, use_cache=False, **options).tolist() == [[2, 2, 2]]


def test_half_precision_is_chosen_from_in_float32() -> None:
    seen = []
    model = plain(True).to(torch.bfloat16)
    generate(model, ids(1, 3, 9), max_new_tokens=2, processors=[lambda _, scores: seen.append(scores.dtype) or scores])
    assert seen == [torch.float32] * 2
