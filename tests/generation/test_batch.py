"""A running batch: random programs of requests, each of which is written as if it were alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tests.models.variants import VARIANTS, VOCAB, decoder_only, encoder_decoder, ids, kept
from transformer import Batch, KVCache
from transformer.cache.policies import KeyNorm, LastQueries
from transformer.errors import ArgumentError, CacheFullError, ConcurrentUseError, DtypeError, NonFiniteError, ShapeError
from transformer.generation import generate
from transformer.generation.requests import Chooser

CACHES: dict[str, dict[str, object] | None] = {
    "off": None,
    "on": {},
    "fixed": {"max_length": 24},
    "int8": {"cache_dtype": "int8"},
    "budget": {"cache_budget": (5, KeyNorm())},
    "queries": {"cache_budget": (6, LastQueries(3))},
}


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


def counting(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A processor that knows the row's history, and how long it is."""
    assert input_ids.shape[0] == scores.shape[0] == 1
    return scores + torch.nn.functional.one_hot(input_ids[:, -1] + input_ids.shape[1], 2 * VOCAB + 40)[:, :VOCAB]


def at_even_lengths(input_ids: Tensor, scores: Tensor) -> bool:
    return input_ids.shape[1] % 2 == 0 and int(input_ids[0, -1]) < 4


def options_of(pick: random.Random) -> dict[str, object]:
    seed = pick.randrange(1000)
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 1.5, "seed": seed},
        {"temperature": 0.8, "top_k": 4, "top_p": 0.9, "seed": seed},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 1.3, "temperature": 1.2, "min_p": 0.1, "seed": seed},
        {"stop_tokens": [1, 2, 3]},
        {"temperature": 2.0, "seed": seed, "stop_tokens": [1, 2, 3, 4], "min_new_tokens": 1},
        {"temperature": 2.0, "seed": seed, "stop_sequences": [[3], [5, 5], [4, 4]]},
        {"temperature": 2.0, "seed": seed, "stop_strings": ["c", "dd", "ef"], "tokenizer": Letters()},
        {"processors": [counting]},
        {"frequency_penalty": 0.8, "no_repeat_ngram_size": 2, "bad_words_ids": [[3], [4, 5]]},
        {"prefix_allowed_tokens_fn": lambda _, ids: [(int(ids[-1]) + step) % VOCAB for step in (1, 3, len(ids))]},
        {"temperature": 1.5, "typical_p": 0.7, "presence_penalty": 0.5, "seed": seed},
        {"stopping_criteria": [at_even_lengths], "temperature": 1.5, "seed": seed},
        {"forced_eos_token_id": 6, "stop_tokens": [6], "prefill_chunk_size": 2},
    ]
    return {"max_new_tokens": pick.randint(1, 9), **pick.choice(kinds)}


def alone(model: nn.Module, prompt: Tensor, **options: object) -> Tensor:
    """What the request gets without a batch, and without the model's own conversation."""
    return generate(model, prompt.unsqueeze(0), **options)[0]


def written(model: nn.Module, prompt: Tensor, options: dict[str, object]) -> Tensor:
    own = None if model.kv_cache is None else model.kv_cache.fork()
    model.clear_cache()
    new = alone(model, prompt, **options)
    model.clear_cache()
    if own is not None and own.batch is not None:
        own.install(model)
    return torch.cat((prompt, new))


@pytest.mark.parametrize("caches", CACHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_random_program(variant: str, caches: str) -> None:
    """Requests that come, end and are removed at any time get the tokens that they get alone; the model's own
    conversation stays as it is."""
    model, pick = decoder_only(variant), random.Random(f"{variant} {caches}")
    if CACHES[caches] is not None:
        model.enable_cache(**CACHES[caches])
        with torch.no_grad():
            model(ids(2, 3, seed=50))
    before = kept(model)
    batch = Batch(model, max_rows=pick.choice([1, 3, 4, None]))
    expected: dict[int, tuple[Tensor, dict[str, object]]] = {}
    steps: dict[int, list[int]] = {}
    finished: dict[int, Tensor] = {}
    for turn in range(50):
        action = pick.random()
        if action < 0.45 and turn < 40:
            prompt, options = ids(1, pick.randint(1, 8), seed=turn)[0], options_of(pick)
            number = batch.add(pick.choice([prompt, prompt.tolist(), prompt.unsqueeze(0)]), **options)
            expected[number] = prompt, options
        elif action < 0.5 and expected.keys() - finished.keys():
            number = pick.choice(sorted(expected.keys() - finished.keys()))
            batch.remove(number)
            del expected[number]
        else:
            for number, tokens in batch.step().items():
                assert len(tokens) == 1
                steps.setdefault(number, []).extend(tokens)
        if action > 0.9:
            finished |= batch.finished()
    finished |= run_out(batch, steps)
    assert not batch.failed()
    assert len(expected) > 4
    assert finished.keys() == expected.keys()
    assert kept(model) == before
    for number, (prompt, options) in expected.items():
        whole = written(model, prompt, options)
        assert torch.equal(finished[number], whole), options
        assert steps[number] == whole[len(prompt) :].tolist()


def run_out(batch: Batch, steps: dict[int, list[int]] | None = None) -> dict[int, Tensor]:
    finished: dict[int, Tensor] = batch.finished()
    while len(batch):
        for number, tokens in batch.step().items():
            (steps if steps is not None else {}).setdefault(number, []).extend(tokens)
        finished |= batch.finished()
    assert batch.step() == {}
    return finished


def test_rows_are_at_most_as_many_as_are_given() -> None:
    batch, counts = Batch(decoder_only(), max_rows=2), []
    numbers = [batch.add([1, 2], max_new_tokens=new) for new in (2, 1, 3, 1)]
    assert len(batch) == 4
    while len(batch):
        counts.append(sorted(batch.step()))
    first, second, third, fourth = numbers
    # In the order in which they came, each in the step after a row has ended.
    assert counts == [[first, second], [first, third], [third, fourth], [third]]
    assert sorted(batch.finished()) == sorted(numbers)
    assert batch.finished() == {}


def test_steps_copy_only_when_rows_come_or_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that arrive together join once; in between each step appends in place."""
    calls: list[str] = []
    for name in ("join", "select"):
        monkeypatch.setattr(KVCache, name, spied(getattr(KVCache, name), name, calls))
    batch = Batch(decoder_only())
    for new in (9, 9, 20):
        batch.add([1, 2, 3], max_new_tokens=new)
    for expected in ([], ["join"], [], [], [], [], [], [], [], ["select"], [], []):
        calls.clear()
        batch.step()
        assert calls == expected
    batch.add([4], max_new_tokens=5)
    batch.step()
    calls.clear()
    batch.step()
    assert calls == ["join"]


def spied(method, name: str, calls: list[str]):
    def counted(*arguments: object) -> object:
        calls.append(name)
        return method(*arguments)

    return counted


class FaultError(Exception):
    """Raised by what tests put into a model."""


@pytest.mark.parametrize("fault", [FaultError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["first layer", "last layer", "head", "choice"])
def test_a_step_that_raises_changes_nothing(place: str, fault: type[BaseException], monkeypatch) -> None:
    """And can be repeated: samples are then those that they would have been."""
    model = decoder_only("gqa rotary, window, both")
    batch, expected = Batch(model), {}
    for row in range(3):
        prompt, options = ids(1, 3 + row, seed=row)[0], {"max_new_tokens": 6, "temperature": 1.5, "seed": row}
        expected[batch.add(prompt, **options)] = written(model, prompt, options)
    steps: dict[int, list[int]] = {}
    for turn in range(6):
        for number, tokens in batch.step().items():
            steps.setdefault(number, []).extend(tokens)
        if turn in (0, 3):
            batch.remove(batch.add([1], max_new_tokens=1))
            length = len(batch)
            with broken(model, place, fault, monkeypatch), pytest.raises(fault):
                batch.step()
            assert len(batch) == length
            assert batch.finished() == batch.failed() == {}
    finished = batch.finished()
    for number, whole in expected.items():
        assert torch.equal(finished[number], whole)
        assert steps[number] == whole[-6:].tolist()


@contextmanager
def broken(model: nn.Module, place: str, fault: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A context in which a forward raises, or the choice of tokens after it."""

    def fails(*_: object) -> None:
        raise fault

    if place == "choice":
        choose = Chooser.__call__

        def chosen(*arguments: object) -> object:
            choose(*arguments)
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr(Chooser, "__call__", chosen)
            yield
        return
    modules = {"first layer": model.decoder.blocks[0], "last layer": model.decoder.blocks[-1], "head": model.head}
    hook = modules[place].register_forward_hook(fails)
    yield
    hook.remove()


def test_an_error_of_a_request_ends_it_alone() -> None:
    """Logits that are not finite, at first or later, and what its own processors, criteria and tokenizer raise."""
    model = decoder_only()
    with torch.no_grad():
        model.embedding.tokens.weight[7] = torch.nan
        model.head.proj.weight[7] = 0.0

    def late(_: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([7]), 0.0)

    def wrong(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == 4:
            raise FaultError
        return scores

    class NoDecoder:
        def decode(self, _: list[int]) -> str:
            raise FaultError

    batch = Batch(model)
    good = {batch.add(p, max_new_tokens=6): p for p in ([1, 2], [3])}
    bad = {
        batch.add([7, 1], max_new_tokens=6): (NonFiniteError, 0),
        batch.add([1, 2], max_new_tokens=6, processors=[late]): (NonFiniteError, 1),
        batch.add([1, 2], max_new_tokens=6, processors=[wrong]): (FaultError, 2),
        batch.add([1, 2], max_new_tokens=6, stopping_criteria=[lambda *_: "yes"]): (ArgumentError, 0),
        batch.add([1, 2], max_new_tokens=6, stop_strings="a", tokenizer=NoDecoder()): (FaultError, 0),
        batch.add([1, 2], max_new_tokens=6, forced_eos_token_id=VOCAB): (ArgumentError, 5),
        batch.add([1, 2], max_new_tokens=6, bad_words_ids=[[each] for each in range(VOCAB)]): (NonFiniteError, 0),
    }
    steps: dict[int, list[int]] = {}
    finished = run_out(batch, steps)
    failed = batch.failed()
    assert batch.failed() == {}
    assert {number: type(error) for number, error in failed.items()} == {n: kind for n, (kind, _) in bad.items()}
    assert {number: len(steps.get(number, [])) for number in bad} == {n: count for n, (_, count) in bad.items()}
    assert finished.keys() == good.keys()
    for number, prompt in good.items():
        assert torch.equal(finished[number], written(model, torch.tensor(prompt), {"max_new_tokens": 6}))


def test_a_prompt_that_cannot_be_read_ends_its_request() -> None:
    model = decoder_only()
    batch = Batch(model)
    running = batch.add([1, 2], max_new_tokens=4)
    batch.step()

    def long(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].shape[1] > 3:
            raise FaultError

    model.register_forward_pre_hook(long)
    failing = batch.add([1] * 4, max_new_tokens=4)
    other = batch.add([5], max_new_tokens=1)
    assert batch.step().keys() == {running, other}
    assert [*batch.failed()] == [failing]
    assert run_out(batch).keys() == {running, other}


def test_requests_are_removed_wherever_they_are() -> None:
    batch = Batch(decoder_only(), max_rows=2)
    running, done, waiting = (batch.add([1, 2], max_new_tokens=new) for new in (9, 1, 1))
    batch.step()
    for number in (running, done, waiting):
        batch.remove(number)
        with pytest.raises(ArgumentError, match=r"^number: expected that of a request in the batch"):
            batch.remove(number)
    assert len(batch) == 0
    assert batch.step() == {}
    assert batch.finished() == batch.failed() == {}


def test_arguments_are_refused() -> None:
    model = decoder_only("mha learned, after").enable_cache(max_length=10)
    batch = Batch(model)
    cases: list[tuple[object, dict[str, object], type[Exception], str]] = [
        ([], {}, ShapeError, "prompt"),
        ([1.5], {}, ArgumentError, "prompt"),
        ("text", {}, ArgumentError, "prompt"),
        (torch.ones(3), {}, DtypeError, "prompt"),
        (torch.ones(2, 3, dtype=torch.int64), {}, ShapeError, "prompt"),
        ([VOCAB], {}, ArgumentError, "input_ids"),
        ([1], {"num_beams": 2}, ArgumentError, "num_beams"),
        ([1], {"num_return_sequences": 2, "temperature": 1.0}, ArgumentError, "num_return_sequences"),
        ([1], {"use_cache": False}, ArgumentError, "use_cache"),
        ([1], {"temperature": [1.0, 2.0]}, ArgumentError, "temperature"),
        ([1], {"eos_token_id": 2}, ArgumentError, "eos_token_id"),
        ([1] * 10, {"max_length": 10}, ArgumentError, "max_length"),
        ([1, 2], {"max_new_tokens": 10}, CacheFullError, "max_new_tokens"),
    ]
    for prompt, options, error, name in cases:
        given = options if "max_length" in options else {"max_new_tokens": 3, **options}
        with pytest.raises(error, match=f"^{name}"):
            batch.add(prompt, **given)
    assert len(batch) == 0
    model.train()
    with pytest.raises(ArgumentError, match=r"^model: expected eval\(\)"):
        batch.add([1], max_new_tokens=1)
    for rows in (0, True, 1.5):
        with pytest.raises(ArgumentError, match=r"^max_rows"):
            Batch(model, max_rows=rows)
    with pytest.raises(ArgumentError, match=r"^model: expected a decoder-only model"):
        Batch(encoder_decoder())
    with pytest.raises(ArgumentError, match=r"^model"):
        Batch("model")
    with pytest.raises(ArgumentError, match=r"^use_cache"):
        Batch(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match=r"^generate, stream: expected a model with a head"):
        Batch(decoder_only(has_head=False, tied_embeddings=False)).add([1], max_new_tokens=1)


def test_stop_tokens_of_the_model_end_requests() -> None:
    model = decoder_only(stop_tokens=(1, 2, 3), pad_token=9)
    batch, prompt = Batch(model), ids(1, 4)
    number = batch.add(prompt[0], max_new_tokens=40, temperature=2.0, seed=3)
    own = batch.add(prompt[0], max_new_tokens=40, temperature=2.0, seed=3, stop_tokens=[])
    finished = run_out(batch)
    assert torch.equal(finished[number], model.generate(prompt, max_new_tokens=40, temperature=2.0, seed=3)[0])
    assert len(finished[own]) == 44


def test_a_wrapper_runs_and_its_hooks_see_each_step() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = decoder_only()

        def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.inner(tokens, attention_mask)

    wrapper, seen = Wrapper(), []
    wrapper.register_forward_hook(lambda _, arguments, __: seen.append(tuple(arguments[0].shape)))
    batch = Batch(wrapper)
    first, second = batch.add([1, 2, 3], max_new_tokens=3), batch.add([4], max_new_tokens=2)
    finished = run_out(batch)
    assert seen == [(1, 3), (1, 1), (2, 1), (1, 1)]
    for number, prompt in ((first, [1, 2, 3]), (second, [4])):
        whole = finished[number]
        assert torch.equal(
            whole, written(wrapper.inner, torch.tensor(prompt), {"max_new_tokens": len(whole) - len(prompt)})
        )


def test_threads_take_turns_and_calls_inside_are_refused() -> None:
    """Requests are added and fetched in other threads while steps run; a call from a processor is refused."""
    model = decoder_only()
    batch, expected, finished = Batch(model, max_rows=3), {}, {}

    def adding() -> None:
        for seed in range(20):
            prompt = ids(1, 1 + seed % 5, seed=seed)[0]
            expected[batch.add(prompt, max_new_tokens=3)] = prompt

    thread = threading.Thread(target=adding)
    thread.start()
    stepping = [threading.Thread(target=batch.step) for _ in range(8)]
    for each in stepping:
        each.start()
    for each in (*stepping, thread):
        each.join()
    finished |= run_out(batch)
    assert finished.keys() == expected.keys()
    for number, prompt in expected.items():
        assert torch.equal(finished[number], written(model, prompt, {"max_new_tokens": 3}))

    def inside(_: Tensor, scores: Tensor) -> Tensor:
        batch.step()
        return scores

    number = batch.add([1], max_new_tokens=1, processors=[inside])
    batch.step()
    assert isinstance(batch.failed()[number], ConcurrentUseError)


def test_time_is_that_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins when the prompt is read, and ends the request with the token that it is over at."""
    times: Iterator[float] = iter(range(100))
    batch = Batch(decoder_only(), max_rows=1)
    first = batch.add([1], max_new_tokens=5)
    second = batch.add([1], max_new_tokens=50, max_time=2.5)
    monkeypatch.setattr("transformer.generation.stops.monotonic", lambda: next(times))
    finished = run_out(batch)
    assert len(finished[first]) == 6
    assert len(finished[second]) == 1 + 3
