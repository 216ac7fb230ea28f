"""Prefixes of prompts that are known: the tokens are those of plain `generate`, and only the rest is read."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tests.models.variants import VARIANTS, VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from transformer import PrefixCache
from transformer.cache.policies import KeyNorm
from transformer.errors import ArgumentError, CacheFullError, ConcurrentUseError, NonFiniteError
from transformer.generation import generate
from transformer.kernels import tuned

MUCH = 1 << 30
OPTIONS: list[dict[str, object]] = [
    {"max_new_tokens": 4},
    {"max_new_tokens": 3, "repetition_penalty": 1.6},
    {"max_length": 22},
    {"max_new_tokens": 4, "temperature": 1.5, "seed": 3},
    {"max_new_tokens": 4, "stop_tokens": [1, 2, 3]},
    {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2},
    {"max_new_tokens": 3, "temperature": 1.2, "num_return_sequences": 2, "seed": 5},
    {"max_new_tokens": 4, "prefill_chunk_size": 2},
]


def plain(model: nn.Module, prompt: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    copies = options.get("num_return_sequences", 1)
    new = generate(model, prompt, mask, **options)
    return torch.cat((prompt.repeat_interleave(copies, 0), new), 1)


@contextmanager
def lengths_read(model: nn.Module) -> Iterator[list[int]]:
    """How many columns the model reads in each call."""
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    yield lengths
    hook.remove()


def one_of(pick: random.Random, known: list[list[int]]) -> list[int]:
    """A prompt that continues what is known, leaves it early, repeats it, or is new; of at most 16 tokens."""
    new = [pick.randrange(VOCAB) for _ in range(pick.randint(1, 4))]
    if not known or pick.random() < 0.2:
        return new
    before = pick.choice(known)
    return (before[: pick.randint(1, len(before))] + new * pick.randint(0, 1))[:16]


@pytest.mark.parametrize("cached", [False, True], ids=["caches off", "caches on"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_random_chat(variant: str, cached: bool) -> None:
    """One row or several, padded, with any option: as without a store, and the model's conversation stays."""
    model, other, pick = decoder_only(variant), decoder_only(variant), random.Random(variant)
    if cached:
        with torch.no_grad():
            model.enable_cache()(ids(2, 3, seed=50))
    before = kept(model)
    prefixes, known, most_saved = PrefixCache(model, MUCH), list[list[int]](), 0
    for _ in range(15):
        rows = [one_of(pick, known) for _ in range(pick.choice([1, 1, 1, 2, 3]))]
        width, options = max(map(len, rows)), pick.choice(OPTIONS)
        mask = padding([(width - len(row), len(row)) for row in rows], width)
        prompt = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        given = None if bool(mask.all()) else mask
        saved = prefixes.tokens_saved
        out = prefixes.generate(prompt, given, **options)
        assert torch.equal(out, plain(other, prompt, given, **options)), (rows, options)
        assert prefixes.tokens_saved - saved <= sum(len(row) - 1 for row in rows)
        most_saved = max(most_saved, prefixes.tokens_saved - saved)
        known.append(out[0, width - len(rows[0]) :].tolist())
    assert most_saved > 5
    assert kept(model) == before


def test_only_what_is_new_is_read() -> None:
    """A chat that goes on reads its last token and the new turn; another end of it reads from where they differ."""
    model = decoder_only()
    prefixes, first = PrefixCache(model, MUCH), ids(1, 9)
    answered = prefixes.generate(first, max_new_tokens=3)
    turn = torch.cat((answered, ids(1, 4, seed=1)), 1)
    with lengths_read(model) as lengths:
        longer = prefixes.generate(turn, max_new_tokens=2)
    assert lengths == [5, 1]
    assert prefixes.tokens_saved == 11
    assert len(prefixes) == 1, "the longer conversation has the shorter one in it"
    edited = turn.clone()
    edited[0, 6] = (edited[0, 6] + 1) % VOCAB
    with lengths_read(model) as lengths:
        prefixes.generate(edited, max_new_tokens=1)
    assert lengths == [turn.shape[1] - 6]
    assert len(prefixes) == 2
    with lengths_read(model) as lengths:
        assert torch.equal(prefixes.generate(turn, max_new_tokens=2), longer)
    assert lengths == [1, 1], "of a prompt that is known whole the last token is read"


def test_rows_of_one_prefix_share_its_memory() -> None:
    """While they are written and where they are kept; rows of different prefixes, or of none, join."""
    model, system = decoder_only(dtype=torch.float32), ids(1, 400)
    prefixes = PrefixCache(model, MUCH)
    prefixes.generate(system, max_new_tokens=1)
    alone = prefixes.nbytes
    rows = torch.cat((system.expand(8, -1), ids(8, 4, seed=1)), 1)
    with tuned(min_shared_bytes=0):
        out = prefixes.generate(rows, max_new_tokens=3)
    assert torch.equal(out, plain(decoder_only(dtype=torch.float32), rows, max_new_tokens=3))
    assert prefixes.tokens_saved == 8 * 400
    whole = PrefixCache(model, MUCH)
    whole.generate(rows, max_new_tokens=3)
    assert prefixes.nbytes < whole.nbytes / 2 + alone
    with lengths_read(model) as lengths:
        again = prefixes.generate(rows[[5]], max_new_tokens=3)
    assert torch.equal(again[0], out[5])
    assert lengths == [1, 1, 1]
    mixed = torch.cat((rows[[2]], ids(1, 404, seed=9)))
    with lengths_read(model) as lengths:
        again = prefixes.generate(mixed, max_new_tokens=3)
    assert torch.equal(again, plain(decoder_only(dtype=torch.float32), mixed, max_new_tokens=3))
    assert lengths[0] == 404


def test_bytes_are_bounded_and_the_least_recently_used_go() -> None:
    model, (a, b, c) = decoder_only(), (ids(1, 6, seed=seed) for seed in range(3))
    sizes = PrefixCache(model, MUCH)
    sizes.generate(a, max_new_tokens=1)
    prefixes = PrefixCache(model, 2 * sizes.nbytes)
    for prompt in (a, b, a, c):
        prefixes.generate(prompt, max_new_tokens=1)
        assert prefixes.nbytes <= 2 * sizes.nbytes
    assert len(prefixes) == 2
    saved = prefixes.tokens_saved
    prefixes.generate(a, max_new_tokens=1)
    assert prefixes.tokens_saved == saved + 5
    prefixes.generate(b, max_new_tokens=1)
    assert prefixes.tokens_saved <= saved + 6, "b was not used for the longest time"
    nothing = PrefixCache(model, 0)
    assert torch.equal(nothing.generate(a, max_new_tokens=4), plain(model, a, max_new_tokens=4))
    assert len(nothing) == nothing.nbytes == 0
    prefixes.clear()
    assert len(prefixes) == prefixes.nbytes == 0


def test_what_other_weights_have_read_is_forgotten() -> None:
    """After a change in place, a replacement, and of other options of the caches."""
    model, prompt = decoder_only(), ids(1, 9)
    prefixes = PrefixCache(model, MUCH)

    def in_place() -> None:
        with torch.no_grad():
            model.decoder.blocks[0].feed_forward.reset_parameters()

    def replaced() -> None:
        model.load_state_dict(decoder_only(tied_embeddings=False).state_dict(), assign=True)

    for change in (in_place, replaced, lambda: model.enable_cache(cache_dtype="int8"), model.disable_cache):
        prefixes.generate(prompt, max_new_tokens=3)
        saved = prefixes.tokens_saved
        prefixes.generate(prompt, max_new_tokens=3)
        assert prefixes.tokens_saved == saved + 8
        change()
        out = prefixes.generate(prompt, max_new_tokens=3)
        assert prefixes.tokens_saved == saved + 8
        model.clear_cache()
        assert torch.equal(out, plain(model, prompt, max_new_tokens=3))
        model.clear_cache()


def test_nothing_is_reused_with_a_budget() -> None:
    """Which tokens it keeps depends on the calls that a prompt is read in."""
    model, prompt = decoder_only().enable_cache(cache_budget=(5, KeyNorm())), ids(1, 12)
    prefixes = PrefixCache(model, MUCH)
    out = [prefixes.generate(prompt, max_new_tokens=4) for _ in range(2)]
    assert torch.equal(*out)
    assert prefixes.tokens_saved == len(prefixes) == 0
    assert torch.equal(out[0], model.generate(prompt, max_new_tokens=4))


def test_scores_are_those_without_a_store() -> None:
    model, prompt = decoder_only(), ids(2, 7)
    prefixes = PrefixCache(model, MUCH)
    for options in ({}, {"num_beams": 3}, {"temperature": 1.0, "seed": 1}):
        for _ in range(2):
            found = prefixes.generate(prompt, max_new_tokens=3, return_scores=True, **options)
            expected = generate(model, prompt, max_new_tokens=3, return_scores=True, **options)
            assert torch.equal(found.tokens[:, 7:], expected.tokens)
            torch.testing.assert_close(found.log_probabilities, expected.log_probabilities)
            assert found.stop_reasons == expected.stop_reasons
    assert prefixes.tokens_saved == 2 * 6 * 5


@pytest.mark.parametrize("later", [False, True])
def test_a_generation_that_raises_changes_nothing(later: bool) -> None:
    model, prompt = decoder_only(), ids(1, 8)
    prefixes = PrefixCache(model, MUCH)
    prefixes.generate(prompt, max_new_tokens=3)
    found = len(prefixes), prefixes.nbytes, prefixes.tokens_saved

    def broken(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores * torch.nan if input_ids.shape[1] == 10 + later else scores

    with pytest.raises(NonFiniteError):
        prefixes.generate(torch.cat((prompt, ids(1, 2)), 1), max_new_tokens=3, processors=[broken])
    assert (len(prefixes), prefixes.nbytes, prefixes.tokens_saved) == found
    with lengths_read(model) as lengths:
        prefixes.generate(prompt, max_new_tokens=1)
    assert lengths == [1]


def test_arguments_are_refused() -> None:
    model = decoder_only().enable_cache(max_length=12)
    prefixes = PrefixCache(model, MUCH)
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"use_cache": False}, ArgumentError, "use_cache"),
        ({"return_scores": 1}, ArgumentError, "return_scores"),
        ({"max_new_tokens": 9}, CacheFullError, "max_new_tokens"),
        ({"eos_token_id": 1}, ArgumentError, "eos_token_id"),
    ]
    for options, error, name in cases:
        with pytest.raises(error, match=f"^{name}"):
            prefixes.generate(ids(1, 5), **{"max_new_tokens": 2, **options})
    with pytest.raises(ArgumentError, match=r"^input_ids"):
        prefixes.generate(torch.full((1, 2), VOCAB), max_new_tokens=2)
    with pytest.raises(ArgumentError, match=r"^model: expected eval\(\)"):
        PrefixCache(decoder_only().train(), 1).generate(ids(1, 5), max_new_tokens=2)
    for size in (-1, 1.5, True):
        with pytest.raises(ArgumentError, match=r"^max_bytes"):
            PrefixCache(model, size)
    with pytest.raises(ArgumentError, match=r"^model: expected a decoder-only model"):
        PrefixCache(encoder_decoder(), 1)


def test_threads_take_turns_and_calls_inside_are_refused() -> None:
    model, results = decoder_only(), {}
    prefixes, prompts = PrefixCache(model, MUCH), [ids(1, 3 + seed % 4, seed=seed % 3) for seed in range(8)]

    def run(number: int) -> None:
        results[number] = prefixes.generate(prompts[number], max_new_tokens=3)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, prompt in enumerate(prompts):
        assert torch.equal(results[number], plain(model, prompt, max_new_tokens=3))

    def inside(_: Tensor, scores: Tensor) -> Tensor:
        prefixes.clear()
        return scores

    with pytest.raises(ConcurrentUseError, match=r"^prefix_cache: expected one call at a time"):
        prefixes.generate(prompts[0], max_new_tokens=1, processors=[inside])
