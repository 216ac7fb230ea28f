"""Pictures of attention hold the weights and the visibility that the modules themselves have."""

import pytest
import torch
from matplotlib import pyplot

from transformer import MultiHeadAttention
from transformer.errors import ArgumentError, DtypeError, ShapeError
from transformer.plots import plot_attention, plot_visibility
from transformer.plots.attention import HIDDEN, PADDING, SINK, VISIBLE


def images(ax):
    return [torch.tensor(image.get_array().filled(0.0).tolist()) for image in ax.get_images()]


def test_each_head_has_an_image_of_its_weights():
    weights = torch.rand(2, 3, 4, 5).softmax(-1)
    ax = plot_attention(weights, row=1)
    torch.testing.assert_close(torch.stack(images(ax)), weights[1])
    assert [text.get_text() for text in ax.texts] == ["head 0", "head 1", "head 2"]
    assert ax.get_xlabel() == "key (token)"
    assert ax.get_ylabel() == "query (token)"
    scales = {image.get_clim() for image in ax.get_images()}
    assert scales == {(0.0, weights[1].max().item())}


@pytest.mark.parametrize("heads", [1, 5, 12])
@pytest.mark.parametrize("shape", [(6, 6), (1, 40), (40, 3)])
def test_no_image_covers_another(heads, shape):
    ax = plot_attention(torch.rand(heads, *shape))
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    extents = [image.get_extent() for image in ax.get_images()]
    for number, (x0, x1, y1, y0) in enumerate(extents):
        assert (x1 - x0, y1 - y0) == pytest.approx(shape[::-1])
        assert left <= x0 < x1 <= right
        assert top <= y0 < y1 <= bottom
        for u0, u1, v1, v0 in extents[:number]:
            assert u1 < x0 or x1 < u0 or v1 < y0 or y1 < v0


def test_weights_of_zero_are_blank():
    (image,) = plot_attention(torch.tensor([[1.0, 0.0], [0.25, 0.75]])).get_images()
    assert image.get_array().mask.tolist() == [[False, True], [False, False]]


def test_chosen_heads_keep_their_numbers():
    weights = torch.rand(1, 4, 3, 3)
    ax = plot_attention(weights, heads=[3, 1])
    torch.testing.assert_close(torch.stack(images(ax)), weights[0, [3, 1]])
    assert [text.get_text() for text in ax.texts] == ["head 3", "head 1"]


def test_texts_stand_beside_their_tokens():
    ax = plot_attention(torch.rand(2, 2, 3), query_tokens=["b", "c"], key_tokens=["a", "b", "c"])
    ticks = dict(zip(ax.get_xticks(), (label.get_text() for label in ax.get_xticklabels()), strict=True))
    assert [ticks[position] for position in (0, 1, 2)] == ["a", "b", "c"]
    assert {label.get_text() for label in ax.get_yticklabels()} == {"b", "c"}


def test_weights_may_carry_a_graph_and_be_of_sixteen_bits():
    weights = torch.rand(2, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    torch.testing.assert_close(torch.stack(images(plot_attention(weights))), weights.detach().float())


def test_the_given_axes_are_drawn_into_and_returned():
    figure, (first, second) = pyplot.subplots(1, 2)
    assert plot_attention(torch.rand(3, 3), ax=first) is first
    assert plot_visibility(3, ax=second) is second
    assert pyplot.get_fignums() == [figure.number]


@pytest.mark.parametrize(
    ("weights", "options", "error", "complaint"),
    [
        ([[1.0]], {}, ArgumentError, "weights: expected a tensor"),
        (torch.rand(3), {}, ShapeError, "weights: expected"),
        (torch.rand(1, 2, 0, 3), {}, ShapeError, "weights: expected"),
        (torch.ones(2, 2, dtype=torch.int64), {}, ArgumentError, "weights: expected a float"),
        (torch.rand(2, 1, 3, 3), {"row": 2}, ArgumentError, "row: expected a whole number from 0 to 1"),
        (torch.rand(2, 3, 3), {"heads": [2]}, ArgumentError, "heads: expected at least one index from 0 to 1"),
        (torch.rand(2, 3, 3), {"heads": []}, ArgumentError, "heads: expected at least one"),
        (torch.rand(2, 3), {"key_tokens": ["a"]}, ArgumentError, "key_tokens: expected 3 texts"),
        (torch.rand(2, 3), {"query_tokens": "ab"}, ArgumentError, "query_tokens: expected 2 texts"),
        (torch.rand(2, 3), {"ax": pyplot}, ArgumentError, "ax: expected None or"),
    ],
)
def test_weights_that_cannot_be_drawn_are_refused(weights, options, error, complaint):
    with pytest.raises(error, match=complaint):
        plot_attention(weights, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (3, 0), (3, 2), (1, 1)])
@pytest.mark.parametrize("mask", [None, [0, 0, 1, 1, 1, 1, 0, 1, 1, 1]])
def test_what_is_drawn_as_visible_is_what_a_module_gives_weight(causal, window, sinks, mask):
    attention = MultiHeadAttention(8, 1, causal, window_size=window, num_sinks=sinks)
    mask = None if mask is None else torch.tensor(mask)
    given = None if mask is None else mask.bool().unsqueeze(0)
    _, weights = attention(torch.randn(1, 10, 8), attention_mask=given, return_weights=True)
    ax = plot_visibility(10, causal=causal, window_size=window, num_sinks=sinks, attention_mask=mask)
    drawn = torch.tensor(ax.get_images()[0].get_array().tolist())
    assert torch.equal((drawn == VISIBLE) | (drawn == SINK), weights[0, 0] > 0)
    padding = torch.zeros(10, dtype=torch.bool) if mask is None else ~mask.bool()
    assert torch.equal(drawn == PADDING, padding | padding.unsqueeze(1))


def test_a_sink_has_its_colour_where_the_window_does_not_reach_it():
    ax = plot_visibility(5, window_size=2, num_sinks=1)
    v, s, h = VISIBLE, SINK, HIDDEN
    assert ax.get_images()[0].get_array().tolist() == [
        [v, h, h, h, h],
        [v, v, h, h, h],
        [s, v, v, h, h],
        [s, h, v, v, h],
        [s, h, h, v, v],
    ]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["visible", "visible as sink", "not visible"]
    assert ax.get_title() == "causal, window of 2, 1 sink"


@pytest.mark.parametrize(
    ("length", "options", "error", "complaint"),
    [
        (0, {}, ArgumentError, "length: expected a whole number of at least 1"),
        (4, {"window_size": 0}, ArgumentError, "window_size: expected"),
        (4, {"num_sinks": -1}, ArgumentError, "num_sinks: expected"),
        (4, {"num_sinks": 1}, ArgumentError, "num_sinks: expected 0 without a window_size"),
        (4, {"causal": 1}, ArgumentError, "causal: expected True or False"),
        (4, {"attention_mask": [1, 1, 1, 1]}, ArgumentError, "attention_mask: expected a tensor"),
        (4, {"attention_mask": torch.ones(2, 4)}, ShapeError, "attention_mask: expected"),
        (4, {"attention_mask": torch.full((4,), 2)}, ArgumentError, "attention_mask: expected bool, or integers 1"),
        (4, {"attention_mask": torch.ones(4)}, DtypeError, "attention_mask: expected bool, or integers 1"),
        (4, {"attention_mask": torch.tensor([-torch.inf, 0, 0, 0])}, DtypeError, "attention_mask: expected bool"),
    ],
)
def test_rules_that_cannot_be_are_refused(length, options, error, complaint):
    with pytest.raises(error, match=complaint):
        plot_visibility(length, **options)
