"""Streams of text that end before a stop string: what may become one is not given until it is decided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints.tokenizers_of_text import TEXTS, byte_level, metaspace, save
from transformer import DecoderOnlyTransformer
from transformer.checkpoints import Tokenizer, load_tokenizer
from transformer.errors import ArgumentError


@pytest.fixture(scope="module", params=[byte_level, metaspace])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save(request.param(), tmp_path_factory.mktemp("tokenizer")))


def before(text: str, stops: list[str]) -> str:
    """The text up to the first stop string, by slices."""
    return next(
        (text[:end] for end in range(len(text) + 1) if any(text[end:].startswith(each) for each in stops)), text
    )


@settings(max_examples=80)
@given(text=st.text("ab ", max_size=12), stops=st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_is_given(bytes_of_text: Tokenizer, text: str, stops: list[str]) -> None:
    """After each token what was given is the beginning of the result, and as long as the text so far allows."""
    stream, out = bytes_of_text.stream(stops), ""
    expected = before(text, stops)
    for end, token in enumerate(text.encode(), 1):
        out += stream.give(token)
        assert expected.startswith(out)
        longest = max(map(len, stops))
        assert len(out) >= min(len(expected), end - longest + 1)
    assert out + stream.rest() == expected
    assert stream.give(97) + stream.rest() == "" or expected == text


@pytest.fixture(scope="module")
def bytes_of_text(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("bytes")
    (folder / "config.json").write_text('{"vocab_size": 256}')
    return load_tokenizer(folder)


@pytest.mark.parametrize("stop", ["fox", " brown", "row", "é, 東", "🙃", "two three", "."])
def test_over_and_inside_of_tokens(tokenizer: Tokenizer, stop: str) -> None:
    for text in TEXTS[:3]:
        tokens = tokenizer.encode(text, begins=False)
        stream = tokenizer.stream([stop, "zz"])
        assert "".join([*map(stream.give, tokens), stream.rest()]) == text.partition(stop)[0]
    stream = tokenizer.stream(stop)
    assert "".join([*map(stream.give, tokens), stream.rest()]) == text.partition(stop)[0], "one text is a list of it"


def test_beside_generation(bytes_of_text: Tokenizer) -> None:
    """What generation ends at is what the text ends before."""
    torch.manual_seed(0)
    model = DecoderOnlyTransformer(256, 8, 2, 8, 1).eval()
    ids = model.generate(torch.tensor([[65]]), max_new_tokens=30, temperature=1.0, seed=1)[0, 1:].tolist()
    whole = bytes_of_text.decode(ids)
    stop = whole[9:11]
    stream, text = bytes_of_text.stream(stop), ""
    options = {"stop_strings": stop, "tokenizer": bytes_of_text, "temperature": 1.0, "seed": 1}
    for token in model.stream(torch.tensor([[65]]), max_new_tokens=30, **options):
        text += stream.give(int(token))
    assert text + stream.rest() == whole.partition(stop)[0] != whole


def test_an_empty_text_is_refused(bytes_of_text: Tokenizer) -> None:
    with pytest.raises(ArgumentError, match=r"^stop_strings: expected texts of at least one character"):
        bytes_of_text.stream(["a", ""])
