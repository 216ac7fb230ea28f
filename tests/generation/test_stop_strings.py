"""Rows that end with a text: over and inside of tokens, at the prompt, in batches, beams, streams and conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StopStringCriteria

from tests.checkpoints.tokenizers_of_text import TEXTS, byte_level, metaspace, save
from transformer.checkpoints import Tokenizer, load_tokenizer
from transformer.errors import ArgumentError
from transformer.generation import GenerationOptions, generate, stream
from transformer.generation.prompt import Prompt
from transformer.generation.rows import Row, rows_of
from transformer.generation.stops import completes_text
from transformer.models import DecoderOnlyTransformer


@pytest.fixture(scope="module", params=[byte_level, metaspace])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save(request.param(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def bytes_of_text(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("bytes")
    (folder / "config.json").write_text('{"vocab_size": 256}')
    return load_tokenizer(folder)


def model(vocabulary: int = 300) -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(vocabulary, 8, 2, 8, 1).eval()


def following(scripts: Sequence[Sequence[int]], begin: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A processor that makes each row write its script, the last token again and again."""

    def follow(tokens: Tensor, scores: Tensor) -> Tensor:
        at = tokens.shape[1] - begin
        ids = torch.tensor([script[min(at, len(script) - 1)] for script in scripts])
        return torch.nn.functional.one_hot(ids, scores.shape[-1]).to(scores.dtype)

    return follow


def row(tokenizer: Tokenizer, stops: Sequence[str], prompt: Sequence[int] = (0,), **options: object) -> Row:
    given = GenerationOptions(max_new_tokens=10**6, stop_strings=stops, tokenizer=tokenizer, **options)
    return rows_of(given, Prompt.of(torch.tensor([list(prompt)]), None))[0]


def oracle(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str]) -> int | None:
    """The step at which the text of all tokens has a stop string for the first time."""
    texts = (tokenizer.decode(list(tokens[: end + 1])) for end in range(len(tokens)))
    return next((step for step, text in enumerate(texts) if any(stop in text for stop in stops)), None)


def ended(row: Row, tokens: Sequence[int]) -> int | None:
    return next((step for step in range(len(tokens)) if completes_text(row, tokens[: step + 1])), None)


@settings(max_examples=60)
@given(data=st.data())
def test_the_first_token_after_which_the_text_has_it(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Any tokens, parts of characters and special ones included, compared with the text of all of them."""
    pieces = st.sampled_from([tokenizer.encode(word, begins=False) for text in TEXTS[:3] for word in text.split(" ")])
    parts = st.one_of(pieces, st.lists(st.integers(0, 280), min_size=1, max_size=3))
    tokens = list(chain.from_iterable(data.draw(st.lists(parts, min_size=1, max_size=12))))
    text = tokenizer.decode(tokens)
    begin = data.draw(st.integers(0, max(len(text) - 1, 0)))
    inside = text[begin : begin + data.draw(st.integers(1, 6))].replace("\N{REPLACEMENT CHARACTER}", "x")
    stops = [inside or "x", data.draw(st.sampled_from(["fox", "é", "🙂", "e two", "東"]))]
    assert ended(row(tokenizer, stops), tokens) == oracle(tokenizer, tokens, stops)


@pytest.mark.parametrize("stop", ["fox", "row", "quick brown", "n fox ju", "T", ".", "dog."])
def test_as_transformers(tokenizer: Tokenizer, tmp_path: Path, stop: str) -> None:
    """Theirs, of the same tokens, one row for each step; they end at the same token."""
    built = byte_level() if len(tokenizer.encode(TEXTS[0])) < 40 else metaspace()
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(save(built, tmp_path) / "tokenizer.json"))
    tokens = tokenizer.encode(TEXTS[0], begins=False)
    assert theirs.decode(tokens).strip() == TEXTS[0]
    criterion = StopStringCriteria(theirs, [stop])
    found = [bool(criterion(torch.tensor([tokens[: step + 1]]), None)) for step in range(len(tokens))]
    assert found.index(True) == ended(row(tokenizer, [stop]), tokens)
    # Their tokenizer ends rows here as well.
    assert ended(row(theirs, [stop]), tokens) == ended(row(tokenizer, [stop]), tokens)


def test_tokens_without_text_and_parts_of_characters(tokenizer: Tokenizer) -> None:
    """A string with many special tokens inside; a character behind others, in whose middle no decoding may begin."""
    special = tokenizer.stop_tokens * 50
    a, b = tokenizer.encode("x", begins=False)[-1:], tokenizer.encode("y", begins=False)[-1:]
    tokens = [*a * 20, *special, *b]
    assert ended(row(tokenizer, ["xy"]), tokens) == len(tokens) - 1
    many = tokenizer.encode("東" * 20 + "é", begins=False)
    for stop in ("é", "東é"):
        assert ended(row(tokenizer, [stop]), many) == len(many) - 1


def test_a_long_text_is_not_decoded_again(bytes_of_text: Tokenizer) -> None:
    decoded: list[int] = []

    class Counting:
        def decode(self, tokens: Sequence[int]) -> str:
            decoded.append(len(tokens))
            return bytes_of_text.decode(tokens)

    counting = row(Counting(), ["stop"])
    assert not completes_text(counting, list(b"x" * 5000))
    assert completes_text(counting, list(b"x" * 5000 + b"stop"))
    assert max(decoded) < 30


def test_rows_of_a_batch_and_the_caches(bytes_of_text: Tokenizer) -> None:
    """Each row ends by its own text; the conversation has read the tokens that were returned."""
    ours = model(256).enable_cache()
    scripts = [list(b"ab. cd"), list(b"a stop at"), list(b"zzzzzzzzz")]
    given = {"max_new_tokens": 7, "tokenizer": bytes_of_text, "processors": [following(scripts, 2)]}
    out = generate(ours, torch.full((3, 2), 65), stop_strings=["b.", " st"], pad_token=0, return_scores=True, **given)
    texts = [bytes(tokens).rstrip(b"\0") for tokens in out.tokens.tolist()]
    assert texts == [b"ab.", b"a st", b"z" * 7]
    assert out.stop_reasons == ["stop_string", "stop_string", "length"]
    assert ours.kv_cache.lengths.tolist() == [5, 6, 9]
    ours.clear_cache()
    own = generate(ours, torch.full((3, 2), 65), stop_strings=[[], ["st"], ["zzzz", "b."]], pad_token=0, **given)
    assert [bytes(tokens).rstrip(b"\0") for tokens in own.tolist()] == [b"ab. cdd", b"a st", b"zzzz"]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"temperature": 1.0}], ids=str)
def test_in_all_strategies(bytes_of_text: Tokenizer, options: dict[str, object]) -> None:
    """A script that is certain; beams end as well, and what a stream gives is the same."""

    def certain(tokens: Tensor, scores: Tensor) -> Tensor:
        return following([b"so it ends"] * tokens.shape[0], 1)(tokens, scores).log()

    given = {"max_new_tokens": 10, "stop_strings": "it e", "tokenizer": bytes_of_text, "processors": [certain]}
    out = generate(model(256), torch.tensor([[65]]), **given, **options)
    assert bytes(out[0].tolist()) == b"so it e"
    if "num_beams" not in options:
        streamed = torch.stack(list(stream(model(256), torch.tensor([[65]]), **given, **options)), 1)
        assert torch.equal(streamed, out)


def test_across_the_border_of_the_prompt(bytes_of_text: Tokenizer) -> None:
    """Only if asked; what is in the prompt alone does not count."""
    prompt = torch.tensor([list(b"END. E"), list(b"xEN. x")])
    scripts = [list(b"ND now END"), list(b"END now...")]
    real = torch.tensor([[1] * 6, [0] + [1] * 5])
    given = {
        "max_new_tokens": 10,
        "stop_strings": "END",
        "tokenizer": bytes_of_text,
        "processors": [following(scripts, 6)],
        "pad_token": 0,
    }
    within = generate(model(256), prompt, real, **given)
    assert [bytes(tokens).rstrip(b"\0") for tokens in within.tolist()] == [b"ND now END", b"END"]
    across = generate(model(256), prompt, real, stop_across_prompt=True, **given)
    assert [bytes(tokens).rstrip(b"\0") for tokens in across.tolist()] == [b"ND", b"END"]


def test_not_in_the_first_tokens(bytes_of_text: Tokenizer) -> None:
    """A string that is complete by then does not count, nor later; the next one does."""
    given = {"stop_strings": ["ab"], "tokenizer": bytes_of_text, "processors": [following([b"abxabab"], 1)]}
    for least, expected in ((0, b"ab"), (1, b"ab"), (2, b"abxab"), (4, b"abxab"), (5, b"abxabab")):
        out = generate(model(256), torch.tensor([[65]]), max_new_tokens=9, min_new_tokens=least, **given)
        assert bytes(out[0].tolist()) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tokenizer", {"stop_strings": "x"}),
        ("tokenizer", {"stop_strings": "x", "tokenizer": 3}),
        ("stop_strings", {"stop_strings": [""], "tokenizer": True}),
        ("stop_strings", {"stop_strings": [3]}),
        ("stop_strings", {"stop_strings": ["a", ["b"]]}),
        ("stop_across_prompt", {"stop_across_prompt": 1}),
    ],
)
def test_refusals(bytes_of_text: Tokenizer, name: str, options: dict[str, object]) -> None:
    given = {**options, **({"tokenizer": bytes_of_text} if options.get("tokenizer") is True else {})}
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        GenerationOptions(max_new_tokens=1, **given)
