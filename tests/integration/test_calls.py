"""State of a call: separate during compilation, after the call, in other threads, and in wrappers of two models."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from transformer.errors import CacheStateError
from transformer.generation import generate

PROMPT, MORE, SOURCE = ids(2, 5), ids(2, 3, seed=1), ids(2, 5, VOCAB + 2)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns there, in inference mode; the context of the caller does not come along."""

    def run() -> Any:
        with torch.inference_mode():
            return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


# --- a call that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder only", "encoder-decoder"])
def test_what_raises_in_the_head_leaves_the_caches_as_they_were(kind: str) -> None:
    model = decoder_only("mha rotary") if kind == "decoder only" else encoder_decoder("mha rotary")
    before = () if kind == "decoder only" else (SOURCE,)
    whole = model(*before, torch.cat((PROMPT, MORE), 1))
    model.enable_cache()
    model(*before, PROMPT)

    def refuse(*_: Any) -> None:
        raise ValueError("the head fails")

    hook = model.head.register_forward_hook(refuse)
    with pytest.raises(ValueError, match="the head fails"):
        model(*before, MORE)
    hook.remove()
    assert_same(model(*before, MORE), whole[:, 5:])


# --- beside a compiler ----------------------------------------------------------------------------------------------


def test_what_another_thread_compiles_changes_no_call() -> None:
    """A generation and a live conversation, while the compiler is at work on another model."""
    model, live, seen = decoder_only("mha rotary"), decoder_only("mha rotary").enable_cache(max_length=20), []
    live(PROMPT)
    live.kv_cache.freeze_layout()

    def backend(graph: Any, _: Any) -> Any:
        seen.append(in_a_thread(lambda: (model.generate(PROMPT, max_new_tokens=4), live(MORE))))
        return graph.forward

    torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    whole = torch.cat((PROMPT, MORE), 1)
    assert_same(seen[0][0], model.generate(PROMPT, max_new_tokens=4, use_cache=False))
    assert_same(seen[0][1].clone(), model(whole)[:, 5:])


GENERATIONS: dict[str, dict[str, Any]] = {
    "live": {},
    "without caches": {"use_cache": False},
    "beams": {"num_beams": 3},
    "samples": {"num_return_sequences": 2, "temperature": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATIONS)
def test_a_generation_by_a_compiled_model_over_a_frozen_layout(name: str) -> None:
    """It has slots of its own: a compiled step writes into none of the model's."""
    said = []
    for compiled in (False, True):
        model = decoder_only("mha rotary").enable_cache(max_length=40)
        model(PROMPT)
        if compiled:
            model.compile(backend="eager")
            model.kv_cache.freeze_layout()
        options = GENERATIONS[name]
        if "temperature" in options:
            options = options | {"generator": torch.Generator().manual_seed(0)}
        tokens = model.generate(MORE, max_new_tokens=4, **options)
        said.append((tokens, model.kv_cache.lengths, model(tokens[:, :2])))
    assert_same(said[1], said[0])


@pytest.mark.slow
def test_a_target_generated_by_a_compiled_model_over_a_frozen_one() -> None:
    model, plain = (encoder_decoder("mha rotary").enable_cache(max_length=20) for _ in range(2))
    model(SOURCE, PROMPT)
    model.compile(backend="eager")
    model.kv_cache.freeze_layout()
    other = ids(2, 7, VOCAB + 2, seed=2)
    assert_same(model.generate(other, max_new_tokens=5), plain.generate(other, max_new_tokens=5))


@pytest.mark.slow
def test_frozen_steps_beside_a_generation_without_caches() -> None:
    """Of the same compiled model, in turns."""
    model = decoder_only("mha rotary").enable_cache(max_length=20)
    whole = torch.cat((PROMPT, MORE), 1)
    expected = decoder_only("mha rotary")(whole)
    model(PROMPT)
    model.compile(backend="eager")
    model.kv_cache.freeze_layout()
    for column in range(5, 8):
        model.generate(PROMPT, max_new_tokens=2, use_cache=False)
        assert_same(model(whole[:, column : column + 1]), expected[:, column : column + 1])


# --- after the call, and elsewhere ----------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True])
def test_a_context_that_was_copied_within_a_call_outlives_it(live: bool) -> None:
    """As an asyncio task that a hook starts has one: what runs there later is in no call any more."""
    model, copied = decoder_only("mha rotary"), []
    block = model.decoder.blocks[0]
    handle = block.register_forward_hook(lambda *_: copied.append(contextvars.copy_context()))
    model.generate(PROMPT, max_new_tokens=2)
    handle.remove()
    expected = model(MORE)
    if live:
        model.enable_cache()
    assert_same(copied[-1].run(model, MORE), expected)
    assert not live or model.kv_cache.length == 3


def test_a_task_that_a_hook_starts() -> None:
    async def main() -> tuple[list[Tensor], Tensor]:
        model, tasks = decoder_only("mha rotary"), []

        async def later() -> Tensor:
            return model(MORE)

        handle = model.decoder.blocks[0].register_forward_hook(lambda *_: tasks.append(asyncio.create_task(later())))
        model.generate(PROMPT, max_new_tokens=2)
        handle.remove()
        return [await task for task in tasks], model(MORE)

    came, expected = asyncio.run(main())
    assert len(came) == 2
    assert_same(came, [expected] * 2)


class Elsewhere(nn.Module):
    """Runs a model in another thread, with or without the context of the call."""

    def __init__(self, inner: nn.Module, in_context: bool) -> None:
        super().__init__()
        self.inner, self.in_context = inner, in_context

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        context = contextvars.copy_context() if self.in_context else contextvars.Context()
        return in_a_thread(lambda: context.run(self.inner, tokens, attention_mask))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("in_context", [False, True])
def test_a_model_run_in_another_thread(in_context: bool, compiled: bool) -> None:
    """Where nothing of it reaches the caches of the generation, it is refused: it would forget its prompt."""
    model = decoder_only("mha rotary")
    expected = generate(model, PROMPT, max_new_tokens=4)
    if compiled:
        model.compile(backend="eager")
    wrapped = Elsewhere(model, in_context)
    if in_context and not compiled:
        assert_same(generate(wrapped, PROMPT, max_new_tokens=4), expected)
    else:
        with pytest.raises(CacheStateError, match="reached none"):
            generate(wrapped, PROMPT, max_new_tokens=4)
    assert_same(generate(wrapped, PROMPT, max_new_tokens=4, use_cache=False), expected)


class Both(nn.Module):
    """The logits of two models, added up."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.first(tokens, attention_mask) + self.second(tokens, attention_mask)


@pytest.mark.parametrize("name", ["first", "second"])
def test_without_caches_every_conversation_in_a_wrapper_is_left_alone(name: str) -> None:
    both = Both(decoder_only("mha rotary"), decoder_only("mqa sinusoidal"))
    expected = generate(both, PROMPT, max_new_tokens=4, use_cache=False)
    model = getattr(both, name).enable_cache()
    model(MORE)
    assert_same(generate(both, PROMPT, max_new_tokens=4, use_cache=False), expected)
    assert model.kv_cache.length == 3
