"""Layout of a shared sequence and of the parts that ranks cache, in one process: every token once, in order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transformer.cache import SequenceLayout, SequencePart, dealt, lengthened
from transformer.kernels import Kernel, biased_attention_state, merge_attention_states


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 5, 48, 97])
def test_each_token_is_in_one_part_and_comes_back_in_order(length: int, ranks: int) -> None:
    layout, whole = SequenceLayout(length, ranks), torch.arange(2 * length * 3).view(2, length, 3)
    parts = [layout.taken(whole, rank) for rank in range(ranks)]
    lengths = [part.shape[1] for part in parts]
    assert lengths == [layout.part_length(rank) for rank in range(ranks)]
    assert sum(lengths) == length
    assert max(lengths) - min(lengths) <= 2
    stacked = torch.stack([lengthened(part, max(lengths), 1) for part in parts])
    assert torch.equal(layout.joined(stacked), whole)


def test_a_rank_has_an_early_and_a_late_chunk() -> None:
    layout = SequenceLayout(16, 4)
    assert [layout.chunks_of(rank) for rank in range(2)] == [(range(2), range(14, 16)), (range(2, 4), range(12, 14))]
    pairs = [sum(position + 1 for chunk in layout.chunks_of(rank) for position in chunk) for rank in range(4)]
    assert len({*pairs}) == 1, "keys that are seen, so work in causal order"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_new_tokens_are_dealt_in_blocks_of_positions_whatever_the_calls(ranks: int) -> None:
    part, length = SequencePart.empty(0, ranks), 0
    for new in (5, 1, 100, 1, 1, 200, 64, 64):
        part, length = part.followed_by(dealt(length, new, ranks)), length + new
    assert part.runs == SequencePart.empty(0, ranks).followed_by(dealt(0, length, ranks)).runs
    owned = [[position for run in runs for position in run] for runs in part.runs]
    assert sorted(position for own in owned for position in own) == list(range(length))
    assert max(map(len, owned)) - min(map(len, owned)) <= 64
    every = [SequencePart(rank, part.runs).positions().double().view(-1, 1) for rank in range(ranks)]
    stacked = torch.stack([lengthened(each, max(map(len, every)), 0) for each in every])
    assert torch.equal(part.joined(stacked), torch.arange(length).double().view(-1, 1))
    cut = part.before(130)
    assert [sum(map(len, runs)) for runs in cut.runs] == [sum(each < 130 for each in own) for own in owned]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_biased_parts_merge_to_the_whole(softcap: float | None) -> None:
    """Also of queries that see no key of a part, over more keys than one block has."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    query, key, value = normal(2, 4, 3, 8), normal(2, 2, 700, 8), normal(2, 2, 700, 8)
    bias = normal(4, 3, 700).masked_fill(torch.rand(3, 700, generator=random) < 0.5, float("-inf"))
    bias[:, 1, :650] = float("-inf")
    scores = torch.einsum("bgrld,bgsd->bgrls", query.view(2, 2, 2, 3, 8) * 0.3, key).flatten(1, 2)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = (scores + bias).softmax(-1).view(2, 2, 2, 3, 700)
    expected = torch.einsum("bgrls,bgsd->bgrld", weights, value).flatten(1, 2)
    parts = [slice(0, 640), slice(640, 640), slice(640, 700)]
    kernel = Kernel(0.3, softcap)
    with torch.no_grad():
        states = [biased_attention_state(kernel, query, key[:, :, p], value[:, :, p], bias[..., p]) for p in parts]
    assert states[0].out[:, :, 1].abs().max() == 0
    outs = torch.stack([state.out for state in states]).flatten(1, 3).unsqueeze(0)
    lses = torch.stack([state.lse for state in states]).flatten(1).unsqueeze(0)
    merged = merge_attention_states(outs, lses).view(expected.shape)
    assert (merged - expected).abs().max() <= 1e-12
    assert (states[0].merged(states[1]).merged(states[2]).out - expected).abs().max() <= 1e-12
