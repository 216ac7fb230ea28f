"""Streams that are abandoned, that alternate, and whose conversation other code has changed."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from transformer import KVCache
from transformer.errors import CacheStateError, NonFiniteError

PROMPT = ids(2, 4)


def test_streams_take_turns_on_one_model() -> None:
    """Each with a conversation of its own, cached or not, and a generate in between; nothing stays in the model."""
    for model, vocabulary in ((decoder_only(), VOCAB), (encoder_decoder(), VOCAB + 2)):
        prompts = [ids(2, 3 + seed, vocabulary, seed) for seed in range(3)]
        given = {"max_new_tokens": 5, "temperature": 1.0}
        caches = (True, False, "auto")
        alone = [
            list(model.stream(p, use_cache=c, generator=torch.Generator().manual_seed(1), **given))
            for p, c in zip(prompts, caches, strict=True)
        ]
        streams = [
            model.stream(p, use_cache=c, generator=torch.Generator().manual_seed(1), **given)
            for p, c in zip(prompts, caches, strict=True)
        ]
        turns: list[list[torch.Tensor]] = [[], [], []]
        for _ in range(5):
            for taken, stream in zip(turns, streams, strict=True):
                taken.append(next(stream))
                assert not torch.is_inference_mode_enabled()
            model.generate(prompts[0], max_new_tokens=2)
            assert model.kv_cache is None
            assert kept(model) == [None] * len(kept(model))
        assert all(torch.equal(torch.stack(a), torch.stack(b)) for a, b in zip(turns, alone, strict=True))
        assert [next(stream, None) for stream in streams] == [None] * 3


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_a_stream_that_is_left(taken: int) -> None:
    """The conversation has the prompt and exactly the yielded tokens, and continues from there."""
    model = decoder_only("gqa rotary, window, both").enable_cache()
    model.generate(ids(2, 3, seed=1), max_new_tokens=2)
    before = kept(model)
    stream = model.stream(PROMPT, padding([(0, 4), (2, 2)], 4), max_new_tokens=5)
    came = list(islice(stream, taken))
    del stream
    lengths = torch.tensor([9, 7]) + taken if taken else torch.tensor([5, 5])
    assert torch.equal(model.kv_cache.lengths, lengths)
    if not taken:
        assert kept(model) == before
        return
    again = decoder_only("gqa rotary, window, both").enable_cache()
    again.generate(ids(2, 3, seed=1), max_new_tokens=2)
    again(PROMPT, padding([(0, 4), (2, 2)], 4))
    with torch.no_grad():
        again(torch.stack(came, 1))
        turn = ids(2, 2, seed=5)
        torch.testing.assert_close(model(turn), again(turn), rtol=0, atol=1e-10)


def test_a_stream_whose_conversation_was_changed() -> None:
    """Never a token from a conversation that is not there any more."""

    def another_stream(model: nn.Module) -> None:
        next(model.stream(PROMPT, max_new_tokens=2))

    changes = [
        another_stream,
        lambda model: model.generate(PROMPT, max_new_tokens=1),
        lambda model: model.clear_cache(),
        lambda model: model.disable_cache(),
        lambda model: model.kv_cache.truncate(1),
        lambda model: model.kv_cache.select([1, 0]),
        lambda model: model.train(),
    ]
    for change in changes:
        for model in (decoder_only().enable_cache(), encoder_decoder().enable_cache()):
            stream = model.stream(PROMPT, max_new_tokens=4)
            next(stream)
            change(model)
            before = kept(model)
            with pytest.raises(CacheStateError, match=r"^stream: the conversation in the model has changed"):
                next(stream)
            assert kept(model) == before


def test_conversations_that_are_put_back_go_on() -> None:
    """One model, two conversations that are taken out and put back: their streams take turns."""
    model = decoder_only().enable_cache()
    expected = [decoder_only().generate(ids(1, 3, seed=seed), max_new_tokens=4)[:, 3:] for seed in range(2)]
    conversations: list[KVCache | None] = [None, None]
    streams = [None, None]
    came: list[list[torch.Tensor]] = [[], []]
    for _ in range(4):
        for own in range(2):
            if conversations[own] is not None:
                conversations[own].install(model)
            streams[own] = streams[own] or model.stream(ids(1, 3, seed=own), max_new_tokens=4)
            came[own].append(next(streams[own]))
            conversations[own] = model.kv_cache.remove(model)
    assert all(torch.equal(torch.stack(own, 1), whole) for own, whole in zip(came, expected, strict=True))


def test_a_stream_that_fails_in_its_prompt_leaves_the_conversation() -> None:
    """A part of a prompt, read in chunks, is not cached."""
    model = decoder_only().enable_cache()
    model.generate(PROMPT, max_new_tokens=2)
    before = kept(model)

    def fail(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if model.kv_cache.length > 8:
            raise KeyboardInterrupt

    hook = model.head.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        next(model.stream(PROMPT, max_new_tokens=2, prefill_chunk_size=1))
    hook.remove()
    assert kept(model) == before


def test_a_new_target_may_have_other_rows() -> None:
    model = encoder_decoder().enable_cache()
    model.generate(ids(3, 4), max_new_tokens=2)
    expected = encoder_decoder().generate(ids(1, 4), max_new_tokens=3)
    assert torch.equal(torch.stack(list(model.stream(ids(1, 4), max_new_tokens=3)), 1), expected)
    before = kept(model)
    with pytest.raises(ValueError, match=r"^top_k"):
        model.stream(ids(1, 4), max_new_tokens=3, top_k=-1)
    assert kept(model) == before


@pytest.mark.parametrize("cached", [True, False])
def test_logits_that_are_not_finite(cached: bool) -> None:
    """One NaN weight: an error that names row and step, never a token; the conversation stays as it was."""
    for options in ({}, {"temperature": 1.0}, {"num_beams": 2}):
        model = decoder_only()
        if cached:
            model.enable_cache()
            model.generate(PROMPT, max_new_tokens=2)
        before = kept(model)
        with torch.no_grad():
            model.decoder.blocks[1].feed_forward.up_proj.weight[0, 0] = torch.nan
        with pytest.raises(
            NonFiniteError, match=r"^logits: expected finite numbers, got NaN or Inf in rows \[0, 1\] at step 0"
        ):
            model.generate(PROMPT, max_new_tokens=3, use_cache=cached, **options)
        assert kept(model) == before


def test_the_row_and_the_step_are_named() -> None:
    """A token whose embedding is NaN spoils its own row, at the step after it was read; other rows had their tokens."""
    model = decoder_only()
    script = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4]])

    def follow(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(script[:, tokens.shape[1] - 4], VOCAB).to(logits.dtype)

    with torch.no_grad():
        model.embedding.tokens.weight[9] = torch.nan
    prompt = PROMPT.masked_fill(PROMPT == 9, 0)
    for use_cache in (True, False):
        with pytest.raises(NonFiniteError, match=r"in rows \[1\] at step 2;"):
            model.generate(prompt, max_new_tokens=4, processors=[follow], use_cache=use_cache)
        out = model.generate(
            prompt, max_new_tokens=4, processors=[follow], use_cache=use_cache, stop_tokens=[9], pad_token=9
        )
        assert out[:, 4:].tolist() == [[1, 2, 3, 4], [1, 9, 9, 9]], "a row that is done may be anything"


def test_processors_that_leave_no_token() -> None:
    for spoil in (torch.nan, -torch.inf, torch.inf):
        for options in ({}, {"temperature": 1.0}, {"num_beams": 2}):
            with pytest.raises(NonFiniteError, match=r"^processors: .* at step 0$"):
                decoder_only().generate(
                    PROMPT, max_new_tokens=3, processors=[lambda _, scores, s=spoil: scores + s], **options
                )


class FailsAt(TorchDispatchMode):
    """Raises at operation number `last`."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.count, self.last = 0, last

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.last:
            raise MemoryError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 1.0, "num_return_sequences": 2}])
def test_an_operation_that_fails_at_the_very_end(options: dict[str, object]) -> None:
    """Out of memory at any of the last operations: the conversation has not moved on."""

    def call(model, last: int = 0) -> int:
        with FailsAt(last) as counted:
            model.generate(ids(2, 1), max_new_tokens=2, **options)
        return counted.count

    model = decoder_only("mha none").enable_cache()
    model.generate(ids(2, 3), max_new_tokens=1)
    start = model.kv_cache.remove(model)
    start.fork().install(model)
    count = call(model)
    for last in range(count - 12, count + 1):
        model.kv_cache.remove(model)
        start.fork().install(model)
        before = kept(model)
        with pytest.raises(MemoryError):
            call(model, last)
        assert kept(model) == before, f"operation {last} of {count}"


def test_a_step_of_a_stream_that_fails_at_the_very_end() -> None:
    model = decoder_only("mha none").enable_cache()
    stream = model.stream(ids(2, 3), max_new_tokens=9)
    next(stream)
    with FailsAt(0) as counted:
        next(stream)
    before = kept(model)
    # No step has fewer operations than the one before it.
    with pytest.raises(MemoryError), FailsAt(counted.count):
        next(stream)
    assert kept(model) == before
