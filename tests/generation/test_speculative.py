"""Speculative decoding: the tokens of plain decoding, token for token, from fewer steps of the model."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.models.variants import VARIANTS, VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from transformer import DecoderOnlyTransformer
from transformer.cache import holders
from transformer.cache.policies import KeyNorm
from transformer.errors import ArgumentError, NonFiniteError
from transformer.generation import Batch, ForwardAdapter, ModelAdapter, PrefixCache, generate

PROMPT, REAL = ids(3, 5), padding([(0, 5), (2, 3), (0, 2)], 5)
NEW = 14
"""New tokens, with the prompt fewer than the learned positions of a variant."""

TURNS = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2], [4, 5, 4, 5, 4, 5, 4, 5], [6, 7, 8, 9, 6, 7, 8, 9]])
"""Prompts that repeat."""


def assistant(variant: str = "mha rotary", noise: float = 0.02) -> DecoderOnlyTransformer:
    """A model that agrees with the one of this variant most of the time."""
    model, generator = decoder_only(variant), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def ways(variant: str = "mha rotary") -> dict[str, dict[str, object]]:
    return {
        "assistant": {"assistant_model": assistant(variant)},
        "lookup": {"prompt_lookup_num_tokens": 4},
    }


WAYS = ["assistant", "lookup"]

CHOICES: dict[str, dict[str, object]] = {
    "greedy": {},
    "one guess": {"num_assistant_tokens": 1, "max_matching_ngram_size": 3},
    "sampled": {"temperature": 1.2},
    "seeds": {"temperature": [0.0, 1.0, 2.0], "seed": [1, 2, 3]},
    "filters": {"temperature": 0.9, "top_k": 6, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "no_repeat_ngram_size": 3},
    "stop tokens": {"stop_tokens": [3, 7], "min_new_tokens": 2},
    "stop sequences": {"stop_sequences": [[1], [4, 4], [6, 2]], "temperature": 1.0},
    "limits": {"max_new_tokens": [3, 14, 1], "forced_eos_token_id": 4},
    "copies": {"temperature": 1.0, "num_return_sequences": 2, "seed": 5},
    "criterion": {"stopping_criteria": [lambda tokens, _: tokens[:, -1] == 5]},
    "of the user": {"processors": [lambda tokens, scores: scores.scatter_(-1, tokens[:, -1:], -1.0)]},
}


def written(model: nn.Module, prompt: Tensor, real: Tensor | None, **options: object) -> list[object]:
    """Tokens, log probabilities and ends."""
    torch.manual_seed(0)
    given = {"max_new_tokens": NEW, "pad_token": 0, **options}
    result = generate(model, prompt, real, return_scores=True, **given)
    return [result.tokens.tolist(), result.log_probabilities, result.stop_reasons]


def assert_equal_results(actual: list[object], expected: list[object]) -> None:
    assert actual[0] == expected[0]
    assert actual[2] == expected[2]
    assert_same(actual[1], expected[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHOICES)
def test_the_tokens_of_plain_decoding(name: str, way: str) -> None:
    """Greedy and sampled, rows together and alone, with equal random numbers; in streams too."""
    model, how, options = decoder_only(), ways()[way], CHOICES[name]
    for prompt, real in ((PROMPT, REAL), (TURNS, None)):
        assert_equal_results(written(model, prompt, real, **options, **how), written(model, prompt, real, **options))
    given = {"max_new_tokens": NEW, "pad_token": 0, **options}
    streams = []
    for more in ({}, how):
        torch.manual_seed(0)
        streams.append(torch.stack(list(model.stream(TURNS, **given, **more)), 1))
    assert torch.equal(*streams)
    if not any(isinstance(value, list) and len(value) == 3 for value in options.values()):
        assert_equal_results(
            written(model, TURNS[:1], None, **options, **how), written(model, TURNS[:1], None, **options)
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_attention(variant: str, way: str) -> None:
    """Windows and sinks too, in a conversation that goes on: the caches are those of plain decoding."""
    model, plain, how = decoder_only(variant).enable_cache(), decoder_only(variant).enable_cache(), ways(variant)[way]
    turn = ids(3, 2, seed=9)
    for prompt, real, new in ((PROMPT, REAL, [4, 7, 6]), (turn, None, 5)):
        options = {"max_new_tokens": new, "temperature": [0.0, 0.8, 0.0], "seed": 1, "stop_tokens": [8]}
        result = written(model, prompt, real, **options, **how)
        assert_equal_results(result, written(plain, prompt, real, **options))
        assert_equal_caches(model, plain)
        model.kv_cache.select([2, 0, 1]), plain.kv_cache.select([2, 0, 1])


def assert_equal_caches(model: nn.Module, plain: nn.Module) -> None:
    for own, other in zip(holders(model).values(), holders(plain).values(), strict=True):
        assert (own.kv_cache is None) == (other.kv_cache is None)
        if own.kv_cache is None:
            continue
        assert own.kv_cache.lengths.tolist() == other.kv_cache.lengths.tolist()
        assert own.kv_cache.cached_lengths.tolist() == other.kv_cache.cached_lengths.tolist()
        assert_same(list(own.kv_cache.values()), list(other.kv_cache.values()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["mha rotary", "mqa alibi, window and sinks", "gqa rotary, window, both"])
def test_a_stream_that_is_abandoned(variant: str, way: str) -> None:
    """After each token the conversation has the tokens up to it, and goes on as after plain decoding."""
    how, options = ways(variant)[way], {"max_new_tokens": 9, "stop_tokens": [8], "pad_token": 0}
    for count in (0, 1, 2, 4, 9):
        models = decoder_only(variant).enable_cache(), decoder_only(variant).enable_cache()
        given = [
            list(islice(each.stream(PROMPT, REAL, **options, **more), count))
            for each, more in zip(models, (how, {}), strict=True)
        ]
        assert [each.tolist() for each in given[0]] == [each.tolist() for each in given[1]]
        if count:
            assert_equal_caches(*models)
            turns = [each.generate(ids(3, 3, seed=4), max_new_tokens=4) for each in models]
            assert torch.equal(*turns)


class Uneven(nn.Module):
    """An assistant that is right in the first row and wrong in all others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = self.model(tokens, attention_mask=attention_mask)
        return torch.cat((logits[:1], logits[1:].roll(1, -1)))


def test_a_row_that_could_be_far_ahead_of_another() -> None:
    """By more tokens than a cache has room for before it moves those of a window to the front."""
    variant = "mqa alibi, window and sinks"
    models = decoder_only(variant).enable_cache(), decoder_only(variant).enable_cache()
    ways_of_both = {"assistant_model": Uneven(decoder_only(variant)).eval()}, {}
    streams = [
        list(islice(each.stream(PROMPT, REAL, max_new_tokens=150, **more), 45))
        for each, more in zip(models, ways_of_both, strict=True)
    ]
    assert torch.equal(*(torch.stack(each) for each in streams))
    assert_equal_caches(*models)


def test_the_distribution_is_kept() -> None:
    """Frequencies of pairs of sampled tokens beside their probabilities, by chi-square."""
    model, count = decoder_only(), 3000
    options = {"temperature": 0.7, "top_k": 4}
    prompt = PROMPT[:1]
    pairs = Counter()
    torch.manual_seed(3)
    for how in ways().values():
        new = model.generate(prompt.expand(count // 2, -1), max_new_tokens=3, **options, **how)[:, 5:]
        pairs.update(map(tuple, new[:, 1:].tolist()))
    expected = exact(model, prompt, options)
    total = sum(pairs.values())
    assert set(pairs) <= set(expected)
    likely = {pair: share for pair, share in expected.items() if share * total >= 5}
    chi_square = sum((pairs[pair] - share * total) ** 2 / (share * total) for pair, share in likely.items())
    # By the normal approximation, 4 standard deviations above the mean.
    freedom = len(likely)
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
    assert freedom > 20


def exact(model: DecoderOnlyTransformer, prompt: Tensor, options: dict[str, float]) -> dict[tuple[int, int], float]:
    """The probability of each pair of the second and the third token."""
    pairs: Counter[tuple[int, int]] = Counter()

    def following(tokens: list[int]) -> list[tuple[int, float]]:
        with torch.no_grad():
            scores = model(torch.tensor([tokens]))[0, -1] / options["temperature"]
        best = scores.topk(int(options["top_k"]))
        return list(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))

    before = prompt[0].tolist()
    for first, p in following(before):
        for second, q in following([*before, first]):
            for third, r in following([*before, first, second]):
                pairs[second, third] += p * q * r
    return dict(pairs)


class Counted:
    """A processor that changes scores by the number of its calls, and a criterion; what they were called with."""

    def __init__(self) -> None:
        self.processed: list[list[int]] = []
        self.judged: list[list[int]] = []

    def process(self, tokens: Tensor, scores: Tensor) -> Tensor:
        self.processed.append(tokens[:, -1].tolist())
        for row, own in enumerate(scores):
            own[(len(self.processed) + 4 * row) % VOCAB] += 1.5
        return scores

    def judge(self, tokens: Tensor, _: Tensor) -> bool:
        self.judged.append(tokens[:, -1].tolist())
        return False


def allowed(_: int, ids: Tensor) -> list[int]:
    if 5 in ids.tolist():
        raise LookupError("the row has ended")
    return [1, 3, 5, 8]


@pytest.mark.parametrize("way", WAYS)
def test_callables_of_the_user_are_called_as_in_plain_decoding(way: str) -> None:
    """Also where they have state, or know no way on after the end of a row."""
    variant, results = "mqa alibi, window and sinks", []
    prompt = PROMPT.masked_fill(PROMPT == 5, 4)
    for more in ({}, ways(variant)[way]):
        for streams in (True, False):
            counted, model = Counted(), decoder_only(variant).enable_cache()
            options = {"processors": [counted.process], "stopping_criteria": [counted.judge], "stop_tokens": [5]}
            options |= {"prefix_allowed_tokens_fn": allowed, "temperature": 0.7, "seed": 3, "max_new_tokens": 9, **more}
            if streams:
                new = torch.stack(list(model.stream(prompt, REAL, **options)), 1).tolist()
            else:
                new = generate(model, prompt, REAL, **options).tolist()
            lengths = [row.index(5) + 1 if 5 in row else len(row) for row in new]
            assert len(set(lengths)) > 1
            # Of rows that have ended they get any tokens.
            calls = [
                [[column[row] for column in columns[:length]] for row, length in enumerate(lengths)]
                for columns in (counted.processed, counted.judged)
            ]
            results.append((new, calls, len(counted.processed), len(counted.judged)))
    assert results[:2] == results[2:]


@pytest.mark.parametrize("way", WAYS)
def test_prefixes_that_are_known(way: str) -> None:
    for variant in ("mha rotary", "gqa rotary, window, both"):
        model, how = decoder_only(variant), ways(variant)[way]
        prefixes = PrefixCache(model, 1 << 24)
        turn, real = PROMPT, REAL
        for _ in range(3):
            options = {"max_new_tokens": 5, "temperature": 0.8, "seed": 2}
            whole = prefixes.generate(turn, real, **options, **how)
            assert torch.equal(whole, model.generate(turn, real, **options))
            real = torch.cat((real, torch.ones_like(whole[:, turn.shape[1] :], dtype=torch.bool)), 1)
            turn = whole
        assert prefixes.tokens_saved > 0


class Counting(ForwardAdapter):
    """An adapter that counts the calls of its model."""

    calls = 0

    def read_last(self, tokens: Tensor, attention_mask: Tensor | None, count: int) -> Tensor:
        self.calls += 1
        return super().read_last(tokens, attention_mask, count)


def test_guesses_that_are_right() -> None:
    """The model as its own assistant guesses all: a step for each six tokens, of which five were guessed."""
    counting = Counting(decoder_only())
    for temperature in (0.0, 1.0):
        counting.calls = 0
        result = generate(
            counting,
            PROMPT,
            REAL,
            max_new_tokens=13,
            temperature=temperature,
            assistant_model=decoder_only(),
            return_scores=True,
        )
        # The first token is from the prompt.
        assert result.accepted == [10, 10, 10]
        assert counting.calls == 3


def test_a_text_that_repeats() -> None:
    """A row that has begun to repeat itself is guessed right by lookup."""

    class Repeating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = decoder_only()

        def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.model(tokens, attention_mask) * 0 + nn.functional.one_hot((tokens + 1) % 4, VOCAB)

    counting = Counting(Repeating().eval())
    result = generate(counting, PROMPT[:1] % 4, max_new_tokens=20, prompt_lookup_num_tokens=6, return_scores=True)
    first = int(PROMPT[0, -1] % 4)
    assert result.tokens.tolist() == [[(first + 1 + place) % 4 for place in range(20)]]
    assert result.accepted[0] >= 12
    assert counting.calls <= 7


def test_all_of_a_cache_of_fixed_size() -> None:
    """Guesses do not need more room than the tokens that were asked for."""
    for how in ways().values():
        model, expected = (
            decoder_only().enable_cache(max_length=12),
            decoder_only().generate(TURNS[:, :5], max_new_tokens=7),
        )
        assert torch.equal(model.generate(TURNS[:, :5], max_new_tokens=7, **how), expected)
        assert model.kv_cache.length == 12


def test_an_assistant_keeps_its_conversation() -> None:
    helper = assistant().enable_cache()
    helper(ids(3, 4))
    before = kept(helper)
    model = decoder_only().enable_cache()
    model(ids(3, 4))
    plain = decoder_only().enable_cache()
    plain(ids(3, 4))
    assert torch.equal(
        model.generate(PROMPT, max_new_tokens=8, assistant_model=helper), plain.generate(PROMPT, max_new_tokens=8)
    )
    assert kept(helper) == before


def test_an_encoder_decoder_repeats() -> None:
    source = ids(3, 5, VOCAB + 2, seed=2)
    for options in ({}, {"temperature": 1.0, "seed": 2}):
        model, plain = encoder_decoder().enable_cache(), encoder_decoder().enable_cache()
        given = {"max_new_tokens": 12, "stop_tokens": [4], **options}
        assert torch.equal(
            model.generate(source, REAL, prompt_lookup_num_tokens=3, **given), plain.generate(source, REAL, **given)
        )
        assert_equal_caches(model, plain)
    with pytest.raises(ArgumentError, match=r"^assistant_model: expected a decoder-only model"):
        encoder_decoder().generate(source, max_new_tokens=3, assistant_model=decoder_only())
    with pytest.raises(ArgumentError, match=r"^assistant_model: expected .* got Linear, which has none"):
        decoder_only().generate(PROMPT, max_new_tokens=3, assistant_model=nn.Linear(2, 2))


REFUSED: dict[str, dict[str, object]] = {
    "expected one of the two": {"assistant_model": decoder_only(), "prompt_lookup_num_tokens": 3},
    "expected num_beams=1": {"prompt_lookup_num_tokens": 3, "num_beams": 2},
    "expected use_cache=True": {"prompt_lookup_num_tokens": 3, "use_cache": False},
    "^prompt_lookup_num_tokens: expected a whole number": {"prompt_lookup_num_tokens": 0},
    "^num_assistant_tokens: expected a whole number": {"assistant_model": decoder_only(), "num_assistant_tokens": None},
    "^max_matching_ngram_size: expected a whole number": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 0},
    "^assistant_model: expected a torch.nn.Module": {"assistant_model": "small"},
    "^assistant_model: expected the vocabulary of the model, 11 tokens, got one of 12": {
        "assistant_model": DecoderOnlyTransformer(VOCAB + 1, 8, 2, 8, 1).double().eval()
    },
    "^assistant_model: expected one that reads and continues the prompt; input_ids": {
        "assistant_model": DecoderOnlyTransformer(2, 8, 2, 8, 1).double().eval()
    },
    "^assistant_model: expected one that reads and continues the prompt; .*max_length": {
        "assistant_model": DecoderOnlyTransformer(VOCAB, 8, 2, 8, 1, position="learned", max_length=7).double().eval()
    },
    "^assistant_model: expected a decoder-only model, got one with cross-attention": {
        "assistant_model": encoder_decoder()
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str) -> None:
    model = decoder_only().enable_cache()
    model(PROMPT)
    before = kept(model)
    with pytest.raises(ArgumentError, match=message):
        model.generate(PROMPT, max_new_tokens=4, **REFUSED[message])
    assert kept(model) == before


def test_caches_and_adapters_that_are_refused() -> None:
    model = decoder_only().enable_cache(cache_budget=(4, KeyNorm()))
    with pytest.raises(ArgumentError, match="without a cache_budget"):
        model.stream(PROMPT, max_new_tokens=4, prompt_lookup_num_tokens=2)

    with pytest.raises(ArgumentError, match="expected neither in a batch"):
        Batch(decoder_only()).add([1, 2], max_new_tokens=4, assistant_model=assistant())

    class Other(ForwardAdapter):
        read_last = ModelAdapter.read_last

    with pytest.raises(ArgumentError, match=r"adapter with read_last\(.*got Other"):
        generate(Other(decoder_only()), PROMPT, max_new_tokens=4, prompt_lookup_num_tokens=2)
    helper = assistant().enable_cache()
    helper(PROMPT[:2])
    with pytest.raises(ArgumentError, match=r"^assistant_model: expected a conversation of 3 rows, .* got 2"):
        decoder_only().generate(PROMPT, max_new_tokens=4, assistant_model=helper)


def test_numbers_that_are_not_finite() -> None:
    """They end the call where plain decoding would end it, and not after a wrong guess."""

    class Failing(nn.Module):
        """NaN after token 7."""

        def __init__(self) -> None:
            super().__init__()
            self.model = decoder_only()

        def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.model(tokens, attention_mask).masked_fill((tokens == 7).unsqueeze(-1), float("nan"))

    outcomes = []
    for how in ({}, *ways().values()):
        model = Failing().eval()
        model.model.enable_cache()
        found = []
        for row in range(11):
            model.model.clear_cache()
            try:
                found.append(
                    generate(model, torch.tensor([[row, 7, row, (row + 1) % 7]]), max_new_tokens=8, **how).tolist()
                )
            except NonFiniteError as error:
                found.append(str(error))
                assert model.model.kv_cache.length == 0
        outcomes.append(found)
    assert all(each == outcomes[0] for each in outcomes)
    assert len(set(map(type, outcomes[0]))) == 2
