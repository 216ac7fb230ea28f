"""Scores of tokens: of those that were generated, of given ones, and of a long document, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.models.variants import VARIANTS, VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from transformer.errors import ArgumentError, DtypeError, ShapeError
from transformer.generation import Generated, perplexity, scores, stream
from transformer.models import UMT5Config, UMT5Model

PROMPT, REAL = ids(3, 5), padding([(0, 5), (2, 3), (0, 2)], 5)
SOURCE = ids(3, 5, VOCAB + 2, seed=2)


@torch.no_grad()
def thought(model: nn.Module, prompt: Tensor, new: list[int], temperature: float = 1.0) -> list[float]:
    """The log probability of each of the new tokens of a row, each by a forward of its own."""
    found = []
    for step, token in enumerate(new):
        whole = torch.cat((prompt, torch.tensor(new[:step], dtype=torch.int64)))
        found.append(float((model(whole[None])[0, -1] / temperature).log_softmax(-1)[token]))
    return found


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.7, "seed": 3}, {"temperature": 0.6, "seed": 1, "num_return_sequences": 2}],
    ids=str,
)
def test_of_generated_tokens(options: dict[str, object], use_cache: bool) -> None:
    """In rows of three lengths that end at several steps; 0 at their padding."""
    model, copies = decoder_only(), options.get("num_return_sequences", 1)
    given = {"max_new_tokens": 6, "stop_tokens": (2, 5, 7), "pad_token": 99, "use_cache": use_cache, **options}
    out = model.generate(PROMPT, REAL, return_scores=True, **given)
    assert isinstance(out, Generated)
    assert torch.equal(out.tokens, model.generate(PROMPT, REAL, **given))
    assert out.beam_scores is None
    assert out.accepted is None
    assert out.log_probabilities.dtype == torch.float64
    for row, tokens in enumerate(out.tokens[:, 5:].tolist()):
        new = [token for token in tokens if token != 99]
        own = PROMPT[row // copies, REAL[row // copies]]
        expected = thought(model, own, new, options.get("temperature", 1.0))
        assert out.log_probabilities[row].tolist() == pytest.approx(
            expected + [0.0] * (len(tokens) - len(new)), abs=1e-9
        )
        assert out.stop_reasons[row] == ("stop_token" if new[-1] in (2, 5, 7) else "length")


@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
def test_of_beams(build) -> None:
    """They sum to the score of the candidate, times a power of its length; the best is first."""
    model, prompt = build(), PROMPT if build is decoder_only else SOURCE
    given = {"max_new_tokens": 6, "stop_tokens": (2, 5), "pad_token": 99, "length_penalty": 0.7}
    out = generate_of(model, prompt, num_beams=4, num_return_sequences=3, **given)
    new = out.tokens[:, 5:] if build is decoder_only else out.tokens
    assert torch.equal(out.log_probabilities == 0, new == 99)
    lengths = (new != 99).sum(1).double()
    torch.testing.assert_close(out.log_probabilities.sum(1) / lengths**0.7, out.beam_scores, rtol=0, atol=1e-12)
    assert (out.beam_scores.view(3, 3).diff(dim=1) <= 0).all()
    if build is decoder_only:
        for row, tokens in enumerate(new.tolist()):
            expected = thought(model, PROMPT[row // 3], [token for token in tokens if token != 99])
            assert out.log_probabilities[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-9)


def generate_of(model: nn.Module, prompt: Tensor, **options: object) -> Generated:
    out = model.generate(prompt, return_scores=True, **options)
    assert torch.equal(out.tokens, model.generate(prompt, **options))
    return out


def test_the_result_may_be_learned_from_and_is_frozen() -> None:
    for options in ({}, {"num_beams": 2}):
        out = decoder_only().generate(PROMPT, max_new_tokens=3, return_scores=True, **options)
        assert not out.tokens.is_inference()
        assert not out.log_probabilities.is_inference()
        with pytest.raises(AttributeError):
            out.tokens = None


def test_where_scores_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^return_scores: expected True or False"):
        decoder_only().generate(PROMPT, max_new_tokens=1, return_scores=1)
    with pytest.raises(ArgumentError, match=r"^return_scores: .* give it to generate\(\)"):
        stream(decoder_only(), PROMPT, max_new_tokens=1, return_scores=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_given_tokens(variant: str) -> None:
    """Each row as if alone, padding anywhere; a conversation in the model goes on; gradients are recorded."""
    model = decoder_only(variant).enable_cache()
    model.generate(PROMPT, max_new_tokens=2)
    before = kept(model)
    given, real = ids(3, 8, seed=4), padding([(0, 8), (3, 4), (0, 5)], 8)
    real[0, 4] = False
    out = model.score(given, real)
    assert kept(model) == before
    assert out.shape == (3, 7)
    for row in range(3):
        columns = real[row].nonzero().flatten().tolist()
        expected = [0.0] * 8
        values = thought(decoder_only(variant), given[row, columns[:1]], given[row, columns[1:]].tolist())
        for column, value in zip(columns[1:], values, strict=True):
            expected[column] = value
        assert out[row].tolist() == pytest.approx(expected[1:], abs=1e-9)
    out.sum().backward()
    assert model.embedding.tokens.weight.grad.abs().sum() > 0


def test_of_given_targets() -> None:
    """They are those of generating them: with the start token in front, padded rows, a prompt of the decoder."""
    model, real = encoder_decoder(), padding([(0, 4), (1, 3), (2, 2)], 4)
    target = ids(3, 4, seed=5)
    for options in ({}, {"num_beams": 3}):
        out = model.generate(
            SOURCE, REAL, target_ids=target, target_mask=real, max_new_tokens=5, return_scores=True, **options
        )
        start = torch.full((3, 1), model.config.start_token)
        mask = torch.cat((torch.ones(3, 1).bool(), real, torch.ones(3, 5).bool()), 1)
        scored = model.score(SOURCE, torch.cat((start, out.tokens), 1), REAL, mask)
        torch.testing.assert_close(scored[:, -5:], out.log_probabilities, rtol=0, atol=1e-9)


def test_of_a_model_of_ones_own_in_16_bits() -> None:
    """Normalised in float32, some tokens at a time."""
    logits, given = torch.randn(2, 9, 7).bfloat16(), ids(2, 9, 7)
    out = scores.next_log_probabilities(logits, given, None)
    expected = [[float(logits[r, c].float().log_softmax(-1)[given[r, c + 1]]) for c in range(8)] for r in range(2)]
    torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=1e-5)


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    given, logits = ids(2, 9, 7), torch.randn(2, 9, 7)
    whole = scores.next_log_probabilities(logits, given, None)
    monkeypatch.setattr(scores, "TOKENS_AT_A_TIME", 3)
    assert torch.equal(scores.next_log_probabilities(logits, given, None), whole)


# --- perplexity -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_plain_loops(model: nn.Module, document: list[int], window: int, stride: int) -> float:
    """The first window that has a token, and more than nothing before it, scores it."""
    scored: dict[int, float] = {}
    begin = 0
    while True:
        part = document[begin : begin + window]
        logits = model(torch.tensor([part]))[0].log_softmax(-1)
        for place in range(1, len(part)):
            scored.setdefault(begin + place, float(logits[place - 1, part[place]]))
        if begin + window >= len(document):
            return math.exp(-sum(scored.values()) / len(scored))
        begin += stride


@pytest.mark.parametrize("length", [2, 7, 8, 9, 30])
def test_perplexity(length: int) -> None:
    model, document = decoder_only(), ids(1, length, seed=7)
    for window, stride in ((8, 1), (8, 3), (8, 7), (8, 8), (2, 1), (100, 100)):
        expected = by_plain_loops(model, document[0].tolist(), window, stride)
        assert perplexity(model, document, window=window, stride=stride) == pytest.approx(expected, rel=1e-9)
        assert perplexity(model, document[0], window=window, stride=stride) == pytest.approx(expected, rel=1e-9)
    whole = math.exp(-float(model.score(document).detach().mean()))
    assert perplexity(model, document, window=length + 3, stride=1) == pytest.approx(whole, rel=1e-9)


def test_a_perplexity_leaves_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    model = decoder_only().enable_cache()
    model.generate(PROMPT, max_new_tokens=2)
    before = kept(model)
    shown = perplexity(model, ids(1, 20), window=6, stride=3, progress=True)
    assert "perplexity" in capsys.readouterr().err
    assert shown == perplexity(decoder_only(), ids(1, 20), window=6, stride=3)
    assert kept(model) == before


@pytest.mark.parametrize(
    ("error", "name", "given"),
    [
        (ArgumentError, "window", {"window": 1}),
        (ArgumentError, "window", {"window": 4.0}),
        (ArgumentError, "stride", {"stride": 0}),
        (ArgumentError, "stride", {"stride": 5}),
        (ArgumentError, "progress", {"progress": 1}),
        (ArgumentError, "ids", {"ids": [1, 2]}),
        (DtypeError, "ids", {"ids": torch.ones(4)}),
        (ShapeError, "ids", {"ids": ids(2, 4)}),
        (ShapeError, "ids", {"ids": ids(1, 1)}),
        (ArgumentError, "model", {"model": decoder_only().train()}),
        (ArgumentError, "model", {"model": len}),
    ],
)
def test_refusals_of_perplexity(error: type[Exception], name: str, given: dict[str, object]) -> None:
    arguments = {"model": decoder_only(), "ids": ids(1, 9), "window": 4, "stride": 2, **given}
    with pytest.raises(error, match=rf"^{name}: expected"):
        perplexity(arguments.pop("model"), arguments.pop("ids"), **arguments)


# --- prompts of the decoder -------------------------------------------------------------------------------------------


def umt5() -> UMT5Model:
    torch.manual_seed(0)
    return UMT5Model(UMT5Config(vocab_size=VOCAB, d_model=16, num_heads=4, head_dim=8, d_ff=20, num_layers=2)).eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0, "seed": [1, 2, 3]}], ids=str)
def test_a_prompt_of_the_decoder(options: dict[str, object]) -> None:
    """As if its tokens had been generated: a row with padding anywhere is the row alone; with or without a start."""
    target, real = ids(3, 4, seed=5), padding([(0, 4), (1, 3), (0, 2)], 4)
    target[:, :2] = target[:, :2].clamp(min=1)
    for model in (encoder_decoder(start_token=0), umt5().double()):
        names = ("target_ids", "target_mask") if type(model) is not UMT5Model else UMT5_NAMES
        source = SOURCE if type(model) is not UMT5Model else ids(3, 5, seed=2)
        given = {"max_new_tokens": 5, **options}
        out = model.generate(source, REAL, **dict(zip(names, (target, real), strict=True)), **given)
        assert torch.equal(out[:, :4], target)
        begun = torch.cat((torch.zeros(3, 1, dtype=torch.int64), target), 1)
        begun_mask = torch.cat((torch.ones(3, 1).bool(), real), 1)
        same = model.generate(source, REAL, **dict(zip(names, (begun, begun_mask), strict=True)), **given)
        assert torch.equal(same[:, 1:], out)
        if "num_beams" not in options:
            streamed = model.stream(source, REAL, **dict(zip(names, (target, real), strict=True)), **given)
            assert torch.equal(torch.stack(list(streamed), 1), out[:, 4:])
        for row in range(3):
            own = {**given, **({"seed": row + 1} if "seed" in options else {})}
            prompt = target[row : row + 1, real[row]]
            alone = model.generate(source[row : row + 1, REAL[row]], use_cache=False, **{names[0]: prompt}, **own)
            assert torch.equal(alone[0, -5:], out[row, -5:])


UMT5_NAMES = "decoder_input_ids", "decoder_attention_mask"


def test_a_prompt_of_the_decoder_is_what_was_generated() -> None:
    model = encoder_decoder()
    whole = model.generate(SOURCE, REAL, max_new_tokens=8)
    for length in (1, 5):
        continued = model.generate(SOURCE, REAL, target_ids=whole[:, :length], max_new_tokens=8 - length)
        assert torch.equal(continued, whole)
        assert torch.equal(model.generate(SOURCE, REAL, target_ids=whole[:, :length], max_length=9), whole)


@pytest.mark.parametrize(
    ("error", "name", "given"),
    [
        (ArgumentError, "target_ids", {"target_ids": [[1]]}),
        (ArgumentError, "target_ids", {"target_ids": torch.full((3, 2), VOCAB)}),
        (ArgumentError, "target_ids", {"target_ids": torch.tensor([[0, 1], [1, 1], [1, 2]])}),
        (ShapeError, "target_ids", {"target_ids": ids(2, 2)}),
        (ShapeError, "target_ids", {"target_ids": ids(3, 0)}),
        (ArgumentError, "target_mask", {"target_mask": REAL}),
        (ArgumentError, "target_mask", {"target_ids": ids(3, 2), "target_mask": torch.zeros(3, 2).bool()}),
        (ArgumentError, "max_length", {"target_ids": ids(3, 5), "max_length": 5, "max_new_tokens": None}),
    ],
)
def test_refusals_of_prompts_of_the_decoder(error: type[Exception], name: str, given: dict[str, object]) -> None:
    model = encoder_decoder(start_token=0)
    for part in model.modules():
        part.register_forward_pre_hook(lambda *_: pytest.fail("something was read"))
    for call in (model.generate, model.stream):
        with pytest.raises(error, match=rf"^{name}: expected"):
            call(SOURCE, **{"max_new_tokens": 3, **given})
