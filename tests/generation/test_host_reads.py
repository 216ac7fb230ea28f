"""Waits of the host in a generation on a device: one look a step at most, and none at what is known."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from tests.simulated_device import DEVICE, counted_waits, on_device
from transformer.cache import CrossKV
from transformer.cache.policies import AccumulatedAttention, KeyNorm, LastQueries, Policy, Random, SinksAndNewest
from transformer.errors import NonFiniteError
from transformer.generation import GenerationOptions, decode, generate
from transformer.generation.choice import Choice
from transformer.generation.prompt import Prompt
from transformer.generation.rows import rows_of
from transformer.models import UMT5Config, UMT5Model

PADDED = padding([(0, 5), (2, 3)], 5)
UNSEEN, STEPS = 4, 6
"""Steps between two looks, fewer here than in the library, and steps of a generation."""

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_k": 8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    "samples of a row": {"temperature": 1.0, "num_return_sequences": 2},
    "penalties": {
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "no_repeat_ngram_size": 3,
        "sequence_bias": [[[4], 1.0], [[2, 3], -1.0]],
        "bad_words_ids": [[1, 2]],
    },
    "typical": {"temperature": 1.0, "typical_p": 0.9},
    "stop tokens": {"stop_tokens": [4, 7]},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "temperature": 1.0, "top_k": 5},
    "forced and excluded": {"stop_tokens": [4, 7], "min_new_tokens": 3, "forced_eos_token_id": 5},
    "options of rows": {"temperature": [1.0, 0.0], "top_k": [3, 0], "repetition_penalty": [1.2, 1.0]},
    "stops of rows": {"stop_tokens": [[4], [7, 2]]},
    "time": {"max_time": 1e9},
    "uncached": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 2},
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "STEPS_UNSEEN", UNSEEN)


def looks(options: dict[str, Any], steps: int) -> int:
    """How often the host may look in so many steps."""
    every_step = "stop_tokens" in options or "num_beams" in options
    return steps if every_step else math.ceil(steps / UNSEEN)


def check(model: nn.Module, real: Tensor | None, options: dict[str, Any]) -> None:
    """The same tokens as on the CPU, one look at the mask, and as many at the steps as they need."""

    def seeded() -> dict[str, Any]:
        return options | ({"generator": torch.Generator().manual_seed(0)} if "temperature" in options else {})

    prompt = ids(2, 5)
    expected = copy.deepcopy(model).generate(prompt, real, max_new_tokens=STEPS, **seeded())
    moved = on_device(model)
    with counted_waits() as waits:
        there, mask = prompt.to(DEVICE), None if real is None else real.to(DEVICE)
        waits.clear()
        out = moved.generate(there, mask, max_new_tokens=STEPS, **seeded())
        steps = STEPS if "stop_tokens" not in options else out.shape[1]
        assert 1 <= len(waits) - (mask is not None) <= looks(options, steps), waits
        assert set(waits) == {"aten._to_copy.default"}
    assert torch.equal(out.numbers, expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_padded_rows(options: dict[str, Any]) -> None:
    check(decoder_only("gqa rotary, window, both", torch.float32), PADDED, options)


@pytest.mark.parametrize("variant", ["mha learned, after", "mqa alibi, window and sinks", "gqa relative, pattern"])
def test_equal_rows(variant: str) -> None:
    check(decoder_only(variant, torch.float32), None, {})


@pytest.mark.parametrize("real", [PADDED, None], ids=["padded", "equal"])
@pytest.mark.parametrize("policy", [KeyNorm(), LastQueries(2), AccumulatedAttention(1), SinksAndNewest(1), Random()])
def test_a_budget_asks_nothing(policy: Policy, real: Tensor | None) -> None:
    model = decoder_only("gqa rotary, window, both", torch.float32).enable_cache(cache_budget=(4, policy))
    check(model, real, {})


@pytest.mark.parametrize("name", ["greedy", "samples of a row", "stop tokens", "beams"])
def test_encoder_decoder(name: str) -> None:
    """The kept source is known by identity, also after beams and samples were selected."""
    check(encoder_decoder(dtype=torch.float32), PADDED, OPTIONS[name])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0}], ids=str)
def test_scores_of_tokens(options: dict[str, Any]) -> None:
    """They are looked at by the user alone."""
    model, prompt = decoder_only(dtype=torch.float32), ids(2, 5)
    given = {"max_new_tokens": STEPS, **options}
    torch.manual_seed(0)
    expected = model.generate(prompt, return_scores=True, **given)
    moved = on_device(model)
    torch.manual_seed(0)
    with counted_waits() as waits:
        there = prompt.to(DEVICE)
        waits.clear()
        out = moved.generate(there, return_scores=True, **given)
        assert len(waits) <= looks(options, STEPS)
    assert torch.equal(out.tokens.numbers, expected.tokens)
    torch.testing.assert_close(out.log_probabilities.numbers, expected.log_probabilities)


def test_umt5() -> None:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=VOCAB, d_model=16, num_heads=4, head_dim=8, d_ff=20, num_layers=2)
    check(UMT5Model(config).eval(), PADDED, {"num_beams": 2})


@pytest.mark.parametrize("name", ["stop tokens", "beams"])
def test_a_conversation_that_continues(name: str) -> None:
    model = decoder_only(dtype=torch.float32).enable_cache()
    check(model, PADDED, OPTIONS[name])


def test_calls_of_a_user() -> None:
    """A decode step with the user's own ids: none; with a mask: one."""
    model = on_device(decoder_only(dtype=torch.float32).enable_cache())
    with counted_waits() as waits, torch.no_grad():
        prompt, real, token = ids(2, 5).to(DEVICE), PADDED.to(DEVICE), ids(2, 1).to(DEVICE)
        waits.clear()
        model(prompt, real)
        assert waits == ["aten._to_copy.default"]
        model(token)
        assert len(waits) == 1
        model(token, torch.ones_like(token))
        assert len(waits) == 2
        attention = model.decoder.blocks[0].attention
        attention.kv_cache = None
        attention(torch.randn(2, 3, 16).to(DEVICE), attn_bias=torch.randn(3, 3).to(DEVICE))
        assert len(waits) == 4, "the two copies"


def test_ids_outside_of_the_vocabulary() -> None:
    """The device asserts their range; on the CPU they are looked at."""
    model = on_device(decoder_only(dtype=torch.float32))
    message = rf"^input_ids: expected token ids from 0 to {VOCAB - 1}"
    for wrong in (VOCAB, -1):
        with counted_waits(), pytest.raises(RuntimeError, match=message):
            model(torch.tensor([[1, wrong]]).to(DEVICE))


class Looks(TorchDispatchMode):
    """Counts the operations that look at ids on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.aminmax.default, torch.ops.aten._local_scalar_dense.default):
            self.counted[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"stop_tokens": [VOCAB]}, {"num_beams": 2}], ids=str)
def test_ids_are_looked_at_once(options: dict[str, Any]) -> None:
    """The caller's on the CPU; those that the generation took are not looked at."""
    model = decoder_only(dtype=torch.float32)
    with Looks() as looks:
        model.generate(ids(2, 4), max_new_tokens=5, **options)
    assert looks.counted == {"aminmax.default": 1, "_local_scalar_dense.default": 2}
    with Looks() as looks, torch.no_grad():
        model(ids(2, 4))
    assert looks.counted == {"aminmax.default": 1, "_local_scalar_dense.default": 2}, "the test can fail"


def test_rows_of_one_source_are_not_copied() -> None:
    """Beams of a source that take each other's place read the same keys and values."""
    kept = CrossKV.given(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))
    beams = kept.selected([0, 0, 0, 1, 1, 1])
    assert beams.selected([2, 0, 1, 5, 5, 3]) is beams
    assert kept.selected([0, 1]) is kept
    others = beams.selected([0, 3, 4, 5])
    assert torch.equal(others.key, kept.key[[0, 1, 1, 1]])
    assert torch.equal(others.selected([1, 0]).value, kept.value[[1, 0]])


class Spoiled(nn.Module):
    """Logits that are NaN in one row from one call on."""

    def __init__(self, row: int, call: int) -> None:
        super().__init__()
        self.row, self.call, self.calls = row, call, 0

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = nn.functional.one_hot(tokens, VOCAB).float()
        if self.calls >= self.call:
            logits[self.row, -1, 3] = math.nan
        self.calls += 1
        return logits


@pytest.mark.parametrize("call", [0, 1, UNSEEN - 1, UNSEEN, 2 * UNSEEN + 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_between_two_looks(temperature: float, call: int) -> None:
    """The error names the first row and step, and few steps follow it."""
    model = Spoiled(1, call)
    with pytest.raises(NonFiniteError, match=rf"in rows \[1\] at step {call};"):
        generate(model, ids(3, 4), max_new_tokens=1000, use_cache=False, temperature=temperature)
    assert model.calls == (call // UNSEEN + 1) * UNSEEN
    stops = Spoiled(1, call)
    with pytest.raises(NonFiniteError, match=rf"in rows \[1\] at step {call};"):
        generate(stops, ids(3, 4), max_new_tokens=1000, use_cache=False, stop_tokens=[VOCAB + 1])
    assert stops.calls == call + 1


def test_nothing_that_follows_is_kept() -> None:
    model = decoder_only(dtype=torch.float32).enable_cache()
    model.generate(ids(2, 4), max_new_tokens=3)
    before, calls = kept(model), []

    def spoil(_: nn.Module, __: object, out: Tensor) -> Tensor:
        calls.append(out.shape[1])
        return out * math.nan if len(calls) == 6 else out

    spoiled = model.decoder.blocks[1].register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"in rows \[0, 1\] at step 5;"):
        model.generate(ids(2, 4), max_new_tokens=9)
    spoiled.remove()
    assert calls == [4, *[1] * 7], "to the look after eight steps"
    assert kept(model) == before


def test_samples_are_those_of_multinomial() -> None:
    options = GenerationOptions(max_new_tokens=1, temperature=1.0, generator=torch.Generator().manual_seed(3))
    choice = Choice(rows_of(options, Prompt.of(ids(4, 1), None)), torch.device("cpu"))
    again = torch.Generator().manual_seed(3)
    for seed in range(20):
        logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
        logits[1, 10:] = -math.inf
        expected = logits.softmax(-1).multinomial(1, generator=again).squeeze(-1)
        assert torch.equal(choice.take(logits), expected)


def test_the_device_counts_waits() -> None:
    with counted_waits() as waits:
        x = torch.tensor([1.0, 2.0], device=DEVICE)
        ask = x.sum().item, x.tolist, x.cpu, x.nonzero, lambda: x[x > 1], x.prod().__bool__, lambda: x.equal(x)
        for number, wait in enumerate(ask, 2):
            wait()
            assert len(waits) == number, waits
        waits.clear()
        (x + 1).to("cpu", non_blocking=True)
        torch.ones(2).to(DEVICE, non_blocking=True)
        torch.arange(2, device=DEVICE)
        assert not waits
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            x + torch.ones(2)
