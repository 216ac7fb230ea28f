"""Lines of bytes pass through what `cache_bytes` counts."""

import pytest

from transformer import DecoderOnlyTransformer, cache_bytes
from transformer.errors import ArgumentError
from transformer.models import DecoderOnlyConfig, EncoderDecoderConfig
from transformer.plots import plot_cache_bytes

CONFIG = DecoderOnlyConfig(100, 32, 4, 64, 2)
LENGTHS = [0, 100, 1000]


@pytest.mark.parametrize("model", [CONFIG, DecoderOnlyTransformer.from_config(CONFIG)])
def test_a_line_passes_through_the_counted_bytes(model):
    ax = plot_cache_bytes(model, LENGTHS, batch=3)
    (line,) = ax.get_lines()
    assert line.get_xdata().tolist() == LENGTHS
    assert line.get_ydata().tolist() == [cache_bytes(CONFIG, 3, length) for length in LENGTHS]
    assert "bytes" in ax.get_ylabel()
    assert "tokens" in ax.get_xlabel()


def test_a_source_counts():
    config = EncoderDecoderConfig(100, 100, 32, 4, 64, 2)
    (line,) = plot_cache_bytes(config, [10], source_length=50).get_lines()
    assert line.get_ydata().tolist() == [cache_bytes(config, 1, 10, 50)]


def test_several_models_stand_in_one_picture_and_differ_in_more_than_colour():
    ax = plot_cache_bytes(CONFIG, LENGTHS, label="full")
    for window in (10, 20):
        sliding = DecoderOnlyConfig(100, 32, 4, 64, 2, window_size=window)
        assert plot_cache_bytes(sliding, LENGTHS, label=f"window of {window}", ax=ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["full", "window of 10", "window of 20"]
    assert len({(line.get_marker(), line.get_linestyle()) for line in ax.get_lines()}) == 3


@pytest.mark.parametrize(
    ("model", "lengths", "complaint"),
    [
        (CONFIG, [], "lengths: expected"),
        (CONFIG, 100, "lengths: expected"),
        (CONFIG, [-1], "length: expected a whole number"),
        (object(), [1], "model: expected"),
    ],
)
def test_what_has_no_bytes_is_refused(model, lengths, complaint):
    with pytest.raises(ArgumentError, match=complaint):
        plot_cache_bytes(model, lengths)
