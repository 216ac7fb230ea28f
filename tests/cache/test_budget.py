"""`cache_budget`: so many tokens after every call, those of a policy that plain loops follow."""

from __future__ import annotations

import copy
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cache.budgets import BudgetedConversation
from tests.cache.subjects import first_values
from tests.conversations import assert_same, cache_snapshot
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens
from transformer import DecoderOnlyTransformer, GroupQueryAttention, KVCache, LayerCache, cache_bytes
from transformer.cache.policies import AccumulatedAttention, KeyNorm, LastQueries, Policy, Random, SinksAndNewest
from transformer.errors import ArgumentError, CacheFullError, CacheStateError, ConfigurationError

POLICIES = {
    "norm": KeyNorm(),
    "last queries": LastQueries(2, 3),
    "accumulated": AccumulatedAttention(2),
    "newest": SinksAndNewest(2),
    "random": Random(1),
}
WINDOWS = {"expanding": {}, "window": {"window_size": 6}, "sinks": {"window_size": 5, "num_sinks": 2}}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scheme", ["rotary halves", "alibi"])
@pytest.mark.parametrize("name", [*POLICIES, "own"])
@torch.no_grad()
def test_many_calls(name: str, scheme: str, window: str) -> None:
    """Prompts of rows of different lengths, single tokens, chunks, padding; in every mode."""
    budget = 5, POLICIES.get(name, first_values)
    options = Options(num_groups=2, scheme=SCHEMES[scheme], **WINDOWS[window])
    module = build(options, cache_budget=budget)
    oracle = BudgetedConversation(module, options, budget)
    masks = {0: padding([(0, 7), (3, 4), (5, 2)], 7), 4: padding([(0, 3), (1, 0), (2, 1)], 3)}
    for number, (length, mode) in enumerate(
        [(7, True), (1, None), (1, True), (2, None), (3, None), (8, None), (1, False)]
    ):
        x, mask = tokens(3, length, 16, seed=number), masks.get(number)
        assert_same(module(x, None, mode, attention_mask=mask), oracle.call(x, mask, mode)[0])
        assert module.kv_cache.cached_lengths.tolist() == oracle.cached_lengths
        assert module.kv_cache.cached_length <= 5
        assert_same(module.kv_cache["value"], oracle.held_values())


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.integers(3, 9),
    st.lists(st.integers(1, 5), min_size=1, max_size=8),
    st.sampled_from([1, 2, 4]),
    st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_random_calls(name: str, most: int, cut: list[int], groups: int, sliding: list[bool]) -> None:
    """Gradients or none, and from one call to the next the cache takes a way around."""
    budget, options = (most, POLICIES[name]), Options(num_groups=groups, scheme=SCHEMES["rotary halves"], window_size=7)
    module = build(options, cache_budget=budget)
    oracle = BudgetedConversation(module, options, budget)
    for number, (length, slides) in enumerate(zip(cut, sliding, strict=False)):
        x, mask = tokens(2, length, 16, seed=number), padding([(0, length), (0, max(length - 2, 0))], length)
        with torch.set_grad_enabled(number % 3 == 2):
            out = module(x, None, None if slides else True, attention_mask=mask)
        assert_same(out.detach(), oracle.call(x, mask, None if slides else True)[0])
        assert module.kv_cache.cached_lengths.tolist() == oracle.cached_lengths
        assert_same(module.kv_cache["value"].detach(), oracle.held_values())
        if number % 2:
            module.kv_cache = pickle.loads(pickle.dumps(module.kv_cache))


class Seen(AccumulatedAttention):
    """Notes the weights that it is given."""

    def __call__(self, *given: Tensor, positions: Tensor, **more: Tensor) -> Tensor:
        self.seen.append((positions, more["weights"]))
        return super().__call__(*given, positions=positions, **more)

    @property
    def seen(self) -> list[tuple[Tensor, Tensor]]:
        return self.__dict__.setdefault("_seen", [])


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_weights_are_those_of_all_queries_so_far(window: str) -> None:
    """Of sinks too, whichever way a query meets them."""
    budget, options = (4, Seen(1)), Options(num_groups=2, scheme=SCHEMES["alibi"], **WINDOWS[window])
    module = build(options, cache_budget=budget)
    oracle = BudgetedConversation(module, options, budget)
    for number, length in enumerate((7, 1, 3, 1, 2)):
        x = tokens(1, length, 16, seed=number)
        module(x)
        oracle.call(x)
        positions, weights = budget[1].seen[-1]
        for g in range(2):
            expected = [oracle.weights[0, g, k] for k in positions[0, g].tolist()]
            assert_same(weights[0, g], torch.tensor(expected, dtype=torch.float64))


def run(module: torch.nn.Module, first: int, last: int) -> list[Tensor]:
    with torch.no_grad():
        return [module(tokens(2, 1, 16, seed=number)) for number in range(first, last)]


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_observed_goes_along(name: str, tmp_path: Path) -> None:
    """Through forks, files, copies, other rows and joined batches."""
    module = build(Options(num_groups=2), cache_budget=(5, POLICIES[name]))
    run(module, 0, 8)
    cache = module.kv_cache
    cache.save(tmp_path / "file")
    others = {
        "fork": cache.fork(),
        "file": LayerCache.load(tmp_path / "file"),
        "copy": copy.deepcopy(cache),
        "rows": cache.fork().select([1, 0, 1]).select([1, 0]),
        "joined": LayerCache.join([cache.fork().select([0]), cache.fork().select([1])]),
        "moved": cache.fork().to(dtype=torch.float64),
    }
    expected, after = run(module, 8, 12), cache_snapshot(module)
    for way, other in others.items():
        module.kv_cache = other
        assert_same(run(module, 8, 12), expected)
        assert cache_snapshot(module) == after, way


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_that_is_never_reached_changes_nothing(name: str) -> None:
    plain, budgeted = build(Options(num_groups=2)), build(Options(num_groups=2), cache_budget=(99, POLICIES[name]))
    assert_same(run(budgeted, 0, 9), run(plain, 0, 9))
    assert budgeted.kv_cache.cached_length == 9


def test_compress_with_a_policy_that_a_budget_has_kept_for() -> None:
    """`compress` alone, once after the prompt: of a budget that is not reached."""
    module = build(Options(num_groups=2), cache_budget=(99, LastQueries(4)))
    run(module, 0, 9)
    once = build(Options(num_groups=2), cache_budget=(5, LastQueries(3)))
    run(once, 0, 9)
    cache = module.kv_cache
    assert cache.fork().compress(5, LastQueries(3)).cached_length == 5
    for by in (LastQueries(5), AccumulatedAttention(5)):
        with pytest.raises(CacheStateError, match=r"cache_budget=\(tokens, policy\)"):
            cache.compress(6, by)
    assert cache.compress(5, KeyNorm()).cached_length == 5


def test_another_budget_that_needs_less_goes_on() -> None:
    """Of more queries the last ones are kept, as if there had been no others."""
    first, second = (build(Options(num_groups=2), cache_budget=(9, LastQueries(window))) for window in (5, 2))
    run(first, 0, 9)
    run(second, 0, 9)
    expected = run(second, 9, 14)
    other = build(Options(num_groups=2), cache_budget=(9, LastQueries(2)))
    other.kv_cache = first.kv_cache
    assert_same(run(other, 9, 14), expected)
    assert cache_snapshot(other) == cache_snapshot(second)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last queries", "accumulated"])
def test_tokens_that_were_read_without_what_the_policy_needs(name: str) -> None:
    plain, budgeted = (build(Options(num_groups=2), **more) for more in ({}, {"cache_budget": (5, POLICIES[name])}))
    run(plain, 0, 3)
    budgeted.kv_cache = plain.kv_cache.fork()
    before = cache_snapshot(budgeted)
    with pytest.raises(CacheStateError, match="kv_cache: expected one that keeps what"):
        run(budgeted, 3, 4)
    assert cache_snapshot(budgeted) == before
    budgeted.kv_cache = None
    run(budgeted, 0, 3)
    cache = budgeted.kv_cache
    with pytest.raises(
        CacheStateError, match=r"length: expected at least 3, since the cache keeps queries or .* fork\(\)"
    ):
        cache.truncate(2)
    assert cache.truncate(3).length == 3
    with pytest.raises(ArgumentError, match="one cache_budget"):
        LayerCache.join([cache, plain.kv_cache])
    plain.kv_cache = cache.fork()
    run(plain, 3, 4)
    budgeted.kv_cache = plain.kv_cache
    with pytest.raises(CacheStateError, match="kv_cache: expected one that keeps what"):
        run(budgeted, 4, 5)


@pytest.mark.parametrize(
    "wrong",
    [4, (4,), (4, "norm"), (4, KeyNorm), (0, KeyNorm()), (2.0, KeyNorm()), (True, KeyNorm()), (4, KeyNorm(), 1)],
)
def test_options_that_are_no_budget(wrong: object) -> None:
    with pytest.raises(ConfigurationError, match="cache_budget"):
        GroupQueryAttention(16, 4, 2, True, True, cache_budget=wrong)
    with pytest.raises(ArgumentError, match="cache_budget"):
        model().enable_cache(cache_budget=wrong)


def test_a_budget_that_sinks_would_fill() -> None:
    options = {"window_size": 5, "num_sinks": 3}
    with pytest.raises(ConfigurationError, match="at least 4"):
        GroupQueryAttention(16, 4, 2, True, True, **options, cache_budget=(3, KeyNorm()))
    assert GroupQueryAttention(16, 4, 2, True, True, **options, cache_budget=(4, KeyNorm())).cache_budget.tokens == 4


ALWAYS = [(AccumulatedAttention(), 32), (LastQueries(3), 3), (SinksAndNewest(2), 2)]


@pytest.mark.parametrize(("by", "always"), ALWAYS)
def test_a_budget_of_which_the_policy_always_keeps_all(by: Policy, always: int) -> None:
    """It would decide nothing: the newest alone would stay. Refused before anything changes."""
    message = f"cache_budget: expected more than {always} tokens, which {re.escape(repr(by))} always keeps, got"
    for few in (always, 1):
        with pytest.raises(ConfigurationError, match=f"{message} {few}; give more, or a policy"):
            GroupQueryAttention(16, 4, 2, True, True, cache_budget=(few, by))
        decoder = model().enable_cache(cache_budget=(9, KeyNorm()))
        with pytest.raises(ArgumentError, match=f"{message} {few}"):
            decoder.enable_cache(cache_budget=(few, by))
        assert decoder.layer_plans()[0].budget == 9
    assert model().enable_cache(cache_budget=(always + 1, by)).layer_plans()[0].budget == always + 1


@pytest.mark.parametrize(("by", "always"), ALWAYS)
def test_sinks_stay_beside_what_a_policy_always_keeps(by: Policy, always: int) -> None:
    new = partial(GroupQueryAttention, 16, 4, 2, True, True, window_size=5, num_sinks=3)
    with pytest.raises(
        ConfigurationError, match=f"more than {always + 3} tokens, since .* 3 sinks stay, got {always + 3};"
    ):
        new(cache_budget=(always + 3, by))
    assert new(cache_budget=(always + 4, by)).cache_budget.tokens == always + 4


def test_a_budget_that_is_set_afterwards() -> None:
    """Checked there, and followed as one of the constructor."""
    module, other = build(Options(num_groups=2)), build(Options(num_groups=2), cache_budget=(5, KeyNorm()))
    module.cache_budget = (5, KeyNorm())
    assert_same(run(module, 0, 9), run(other, 0, 9))
    assert cache_snapshot(module) == cache_snapshot(other)
    for wrong in (4, (0, KeyNorm()), (5, KeyNorm), (5, LastQueries(5))):
        with pytest.raises(ConfigurationError, match="cache_budget"):
            module.cache_budget = wrong
    assert module.cache_budget == (5, KeyNorm())
    module.cache_budget = None
    run(module, 9, 12)
    assert (module.kv_cache.cached_length, module.cache_budget) == (8, None)


def test_a_module_that_was_pickled_before_there_were_budgets() -> None:
    module = build(Options(num_groups=2))
    for name in ("budget", "cache_dtype"):
        del module.__dict__[name]
    module = pickle.loads(pickle.dumps(module))
    assert (len(run(module, 0, 2)), module.cache_budget) == (2, None)


class Strange(Policy):
    """A policy that says other things of itself than there are."""

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value

    def __call__(self, keys: Tensor, *_: Tensor, **__: Tensor) -> Tensor:
        return keys[..., 0]

    def __repr__(self) -> str:
        return "Strange()"

    @property
    def needs_queries(self) -> int:
        return self.value if self.name == "needs_queries" else 0

    @property
    def needs_weights(self) -> bool:
        return self.value if self.name == "needs_weights" else False

    @property
    def always_kept(self) -> int:
        return self.value if self.name == "always_kept" else 0


@pytest.mark.parametrize(
    ("name", "value"), [("needs_queries", 2.5), ("needs_queries", -1), ("needs_weights", 1), ("always_kept", "2")]
)
def test_what_a_policy_of_the_user_says_of_itself(name: str, value: object) -> None:
    by, module = Strange(name, value), build(Options(num_groups=2))
    run(module, 0, 9)
    before, message = cache_snapshot(module), rf"{name} of Strange\(\): expected"
    with pytest.raises(ConfigurationError, match=message):
        module.cache_budget = (5, by)
    with pytest.raises(ConfigurationError, match=message):
        module.kv_cache.compress(5, by)
    assert (cache_snapshot(module), module.cache_budget) == (before, None)


def test_a_function_that_takes_no_positions() -> None:
    """Python's own error; the call has changed nothing, and neither has `compress`."""
    module = build(Options(num_groups=2), cache_budget=(5, lambda keys, values: keys[..., 0]))
    run(module, 0, 5)
    before = cache_snapshot(module)
    with pytest.raises(TypeError, match="positions"):
        run(module, 5, 6)
    with pytest.raises(TypeError, match="positions"):
        module.kv_cache.compress(3, module.cache_budget.policy)
    assert cache_snapshot(module) == before


class Failing(Policy):
    """A policy that raises at one of its calls."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, keys: Tensor, *_: Tensor, **__: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError
        return keys[..., 0]


def test_a_policy_that_raises_leaves_every_layer_as_it_was() -> None:
    by = Failing(at=2)
    decoder = model().enable_cache(cache_budget=(5, by))
    ids = torch.arange(7).view(1, 7)
    with torch.no_grad():
        decoder(ids[:, :4])
        before = [layer["key"].clone() for layer in decoder.kv_cache.parts()]
        with pytest.raises(ZeroDivisionError):
            decoder(ids[:, 4:])
        assert decoder.kv_cache.length == 4
        assert_same([layer["key"] for layer in decoder.kv_cache.parts()], before, atol=0)
        decoder(ids[:, 4:])
    assert (decoder.kv_cache.length, decoder.kv_cache.cached_length) == (7, 5)


def test_a_step_over_a_frozen_layout_runs_eagerly() -> None:
    module, plain = (build(Options(num_groups=2), cache_budget=(5, KeyNorm()), max_cache_length=9) for _ in range(2))
    run(module, 0, 4)
    module.kv_cache.freeze_layout()
    found = run(torch.compile(module, backend="eager"), 4, 8)
    assert_same(found, run(plain, 0, 8)[4:])
    assert cache_snapshot(module) == cache_snapshot(plain)


# --- whole models ---------------------------------------------------------------------------------------------------


def model(**options: object) -> DecoderOnlyTransformer:
    return DecoderOnlyTransformer(50, 16, 4, 32, 2, attention="gqa", num_groups=2, **options).double().eval()


@pytest.mark.parametrize("name", POLICIES)
def test_generation(name: str) -> None:
    """As calls by hand; no step leaves more than the budget, in any layer."""
    decoder = model().enable_cache(cache_budget=(6, POLICIES[name]))
    held = []
    decoder.register_forward_hook(lambda module, *_: held.append(module.kv_cache.cached_length))
    prompt = torch.arange(9).view(1, 9)
    found = decoder.generate(prompt, max_new_tokens=8)
    assert decoder.kv_cache.length == 17
    assert set(held[1:]) == {6}
    by_hand = model().enable_cache(cache_budget=(6, POLICIES[name]))
    by_hand.load_state_dict(decoder.state_dict())
    ids, given = prompt, prompt
    with torch.no_grad():
        for _ in range(8):
            given = by_hand(given)[:, -1:].argmax(-1)
            ids = torch.cat((ids, given), 1)
    assert found.tolist() == ids.tolist()


@pytest.mark.parametrize("name", POLICIES)
def test_beams_and_rows_of_a_batch(name: str) -> None:
    """Each row as it is alone."""
    decoder = model().enable_cache(cache_budget=(6, POLICIES[name]))
    prompt = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 9, 8, 7, 6, 5]])
    mask = padding([(0, 8), (3, 5)], 8)
    together = decoder.generate(prompt, attention_mask=mask, max_new_tokens=6)
    for row in range(2):
        decoder.clear_cache()
        alone = decoder.generate(prompt[row : row + 1][:, mask[row]], max_new_tokens=6)
        assert together[row, 8:].tolist() == alone[0, -6:].tolist()
    decoder.clear_cache()
    assert decoder.generate(prompt[:1], max_new_tokens=6, num_beams=3).shape == (1, 14)


def test_a_maximum_length_holds_what_a_generation_has_at_once() -> None:
    decoder, prompt = model(), torch.arange(9).view(1, 9)
    decoder.enable_cache(max_length=9, cache_budget=(6, KeyNorm()))
    assert decoder.generate(prompt, max_new_tokens=20).shape == (1, 29)
    decoder.clear_cache().enable_cache(max_length=8, cache_budget=(6, KeyNorm()))
    with pytest.raises(CacheFullError, match=r"at most 8 tokens in the cache.* got 9 with this prompt; shorten it, or"):
        decoder.generate(prompt, max_new_tokens=20)
    # A step has one token more than the budget in the cache.
    decoder.enable_cache(max_length=8, cache_budget=(8, KeyNorm()))
    with pytest.raises(CacheFullError, match=r"max_new_tokens: expected at most 3 beside the 5 tokens .* got 20"):
        decoder.generate(prompt[:, :5], max_new_tokens=20)
    assert decoder.generate(prompt[:, :5], max_new_tokens=3).shape == (1, 8)
    assert decoder.disable_cache().layer_plans()[0].budget is None


def test_the_option_is_shown() -> None:
    module = build(Options(num_groups=2), cache_budget=(6, KeyNorm()))
    assert "cache_budget=(6, KeyNorm())" in repr(module)
    assert module.cache_budget == (6, KeyNorm())
    assert "cache_budget" not in repr(build(Options()))


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from([(None, 0), (5, 0), (16, 3), (90, 0)]),
    st.sampled_from([4, 9, 50]),
    st.sampled_from([None, 240]),
)
def test_planned_bytes_are_never_exceeded(
    cut: list[int], memory: tuple[int | None, int], most: int, room: int | None
) -> None:
    window, sinks = memory
    new = partial(GroupQueryAttention, 8, 4, 2, True, True, window_size=window, num_sinks=sinks, max_cache_length=room)
    module, plain, seen = new(cache_budget=(most, KeyNorm())), new(), 0
    for length in cut:
        seen += length
        with torch.no_grad():
            module(torch.randn(2, length, 8))
        planned = cache_bytes(module, 2, seen)
        assert KVCache.from_model(module).nbytes <= planned
        assert sinks or seen <= most or KVCache.from_model(module).nbytes == planned or window
    if room is None and window is None and seen > 150 > most:
        assert planned < cache_bytes(plain, 2, seen)


def test_rows_that_are_left_have_no_token_yet() -> None:
    """`select` leaves a row that was padding so far: there is no sum of attention weights to go on from."""
    module = build(Options(), "MHA", cache_budget=(3, AccumulatedAttention(1)))
    x = tokens(1, 5, 16)
    with torch.no_grad():
        module(tokens(2, 2, 16, seed=1), attention_mask=torch.tensor([[True, True], [False, False]]))
        module.kv_cache.select([1])
        out = module(x)
        module.kv_cache = None
        assert torch.equal(out, module(x))
