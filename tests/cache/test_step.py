"""Facts of one call, and removal and restoration of padding."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from transformer.cache import EMPTY, FlatRun, Lengths
from transformer.cache.step import Step
from transformer.masks import NO_TOKEN, Rule

MASKS = st.integers(1, 3).flatmap(
    lambda batch: st.integers(1, 6).flatmap(
        lambda length: st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch
        )
    )
)


def plan(x: torch.Tensor, real: torch.Tensor | None, window: int | None = None) -> Step:
    return Step.of(x, real).following(EMPTY, Rule(True, window, 0 if window is None else 2))


@given(MASKS)
def test_a_flat_run_and_its_rows(mask: list[list[bool]]) -> None:
    real = torch.tensor(mask)
    x = torch.full((*real.shape, 2), float("nan")).masked_fill(real.unsqueeze(-1), 1.0)
    x = x * torch.arange(1, real.shape[1] + 1).view(1, -1, 1)
    step = plan(x, real)
    assert step.width == max(sum(row) for row in mask)
    if step.width == 0:
        return
    columns = [[i + 1.0 for i, flag in enumerate(flags) if flag] for flags in mask]
    if step.run is None:
        assert real.all()
        return
    flat = step.run.take(x)
    assert step.of_flat_run().shape == tuple(flat.shape[:2])
    assert flat[0, :, 0].tolist() == [number for row in columns for number in row]
    rows = step.run.aligned(flat)
    assert rows[..., 0].tolist() == [row + [0.0] * (step.width - len(row)) for row in columns]
    assert torch.equal(step.run.flat(rows), flat)
    assert torch.equal(step.run.put_back(flat), x.masked_fill(~real.unsqueeze(-1), 0.0))
    heads = flat.unflatten(2, (2, 1)).transpose(1, 2)
    assert torch.equal(step.run.aligned_heads(heads), rows.unflatten(2, (2, 1)).transpose(1, 2))
    assert torch.equal(step.run.flat_heads(step.run.aligned_heads(heads)), heads)
    given = step.run.given_queries(step.run.aligned_heads(heads))
    assert torch.equal(given.transpose(1, 2)[real], heads[0].transpose(0, 1))


def test_positions_of_uniform_rows_are_a_range() -> None:
    step = plan(torch.zeros(3, 4, 8), None)
    assert step.query_positions == range(4)
    assert step.sink_query_positions == range(4)


def test_sink_query_positions_stop_at_the_largest_sink_distance() -> None:
    step = plan(torch.zeros(2, 7, 8), None, window=3)
    assert step.rule.max_sink_distance == 4
    assert torch.as_tensor(step.sink_query_positions).tolist() == [[0, 1, 2, 3, 4, 4, 4]]


def test_the_example_of_the_docstring() -> None:
    step = Step(
        plan(torch.zeros(2, 3, 8), None).rule, 2, 3, Lengths((5, 2)), Lengths((2, 1)), torch.device("cpu"),
        real := torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=torch.bool),
        FlatRun(real, Lengths((2, 1)), torch.device("cpu")),
    )  # fmt: skip
    assert step.width == 2
    assert step.total_lengths == (7, 3)
    assert torch.as_tensor(step.query_positions).tolist() == [[5, 6], [2, 3]]
    assert torch.as_tensor(step.flat_positions).tolist() == [[5, 6, 2]]
    assert step.run.order.tolist() == [[1, 2], [2, 0]]


def test_a_mask_of_real_tokens_alone_is_no_mask() -> None:
    assert plan(torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)).real is None


def test_shared_values_are_worked_out_once() -> None:
    step, made = plan(torch.zeros(1, 1, 8), None), []
    for _ in range(3):
        assert step.once("key", lambda: made.append(1) or 7) == 7
    assert made == [1]


@given(MASKS, st.lists(st.integers(0, 9), min_size=3, max_size=3), st.booleans())
def test_token_positions_count_the_real_tokens_of_each_row(
    mask: list[list[bool]], seen: list[int], alike: bool
) -> None:
    real = torch.tensor(mask)
    x = torch.zeros(*real.shape, 2)
    planned = plan(x, real)
    seen = seen[:1] * len(mask) if alike else seen[: len(mask)]
    before = Lengths.of(seen).expand(len(planned.new_lengths))
    new_lengths = planned.new_lengths.expand(len(before))
    step = replace(planned, past_lengths=before, new_lengths=new_lengths)
    expected = []
    for row, flags in enumerate(mask):
        position = seen[row]
        expected.append([NO_TOKEN] * len(flags))
        for column, flag in enumerate(flags):
            if flag:
                expected[-1][column] = position
                position += 1
    positions = step.token_positions
    if all(map(all, mask)) and len(set(seen)) == 1:
        assert positions == range(seen[0], seen[0] + len(mask[0]))
    else:
        assert positions.dtype == torch.int64
        assert positions.tolist() == expected
        assert step.token_positions is positions, "worked out once"


def test_token_positions_of_ragged_rows_without_a_mask() -> None:
    step = replace(plan(torch.zeros(2, 3, 8), None), past_lengths=Lengths((5, 2)))
    assert torch.as_tensor(step.token_positions).tolist() == [[5, 6, 7], [2, 3, 4]]
    assert step.token_positions is step.query_positions
