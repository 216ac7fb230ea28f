"""Generation with caches, equal to generation without in all strategies; batches equal their rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.models.variants import VARIANTS, VOCAB, decoder_only, encoder_decoder, ids, kept
from tests.setups import padding
from transformer.errors import ArgumentError, CacheFullError, DeviceError, DtypeError, ShapeError

STRATEGIES: dict[str, dict[str, object]] = {
    "greedy": {},
    "sampling": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.3, "top_p": 0.6},
    "min_p": {"temperature": 1.5, "min_p": 0.2},
    "all filters": {"temperature": 2.0, "top_k": 6, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.5},
    "penalty": {"repetition_penalty": 1.7},
    "samples": {"temperature": 1.0, "num_return_sequences": 3},
    "stop": {"temperature": 1.0, "stop_tokens": (1, 4, 7), "stop_sequences": [(2, 3)]},
    "beams": {"num_beams": 3},
    "best beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "stop_tokens": (2, 5)},
}
PROMPT, REAL = ids(3, 5), padding([(0, 5), (2, 3), (0, 2)], 5)
SOURCE = ids(3, 5, VOCAB + 2, seed=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def written(model: nn.Module, given: tuple, **options: object) -> tuple[Tensor, list[Tensor]]:
    """The new tokens, and the logits of which each was taken."""
    seen: list[Tensor] = []

    def keep(_: Tensor, logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits

    out = model.generate(*given, generator=seeded(), **{"processors": [keep], "max_new_tokens": 5, **options})
    return out, seen


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_is_uncached(variant: str, strategy: str) -> None:
    """With caches of the generation's own, and with those of a conversation in the model; prompts of three lengths."""
    options = STRATEGIES[strategy]
    for model, prompt in ((decoder_only(variant), PROMPT), (encoder_decoder(variant), SOURCE)):
        expected, logits = written(model, (prompt, REAL), use_cache=False, **options)
        out, cached_logits = written(model, (prompt, REAL), **options)
        assert torch.equal(out, expected)
        assert_same(cached_logits, logits, atol=1e-9)
        model.enable_cache(max_length=24)
        assert torch.equal(written(model, (prompt, REAL), prefill_chunk_size=2, **options)[0], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits(variant: str) -> None:
    for build in (decoder_only, encoder_decoder):
        model = build(variant, torch.float32)
        out, logits = written(model, (PROMPT, REAL), use_cache=False)
        cached, cached_logits = written(model, (PROMPT, REAL))
        assert torch.equal(cached, out)
        assert_same(cached_logits, logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_is_written_as_if_it_were_alone(variant: str) -> None:
    """Greedy and beams, prompts of different lengths, rows that stop early; to the same number of tokens in all."""
    for options in ({}, {"num_beams": 3}):
        options = {**options, "stop_tokens": (3, 6), "pad_token": 0, "max_length": 12}
        for model, prompt in ((decoder_only(variant), PROMPT), (encoder_decoder(variant), SOURCE)):
            skip = 5 if prompt is PROMPT else 0
            together = model.generate(prompt, REAL, **options)[:, skip:]
            for row in range(3):
                own = prompt[row : row + 1, REAL[row]]
                alone = model.generate(own, **options)[:, own.shape[1] if skip else 0 :]
                width = alone.shape[1]
                assert torch.equal(together[row : row + 1, :width], alone)
                assert (together[row, width:] == 0).all()


def test_equal_seeds_give_equal_tokens() -> None:
    model = decoder_only()
    first, again, other = (
        model.generate(PROMPT, max_new_tokens=12, temperature=2.0, generator=seeded(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    streamed = model.stream(PROMPT, max_new_tokens=12, temperature=2.0, generator=seeded(5))
    assert torch.equal(torch.stack(list(streamed), 1), first[:, 5:])


def test_stop_tokens_and_sequences() -> None:
    """A row ends with the token or sequence that stops it, and padding follows; sequences count new tokens only."""
    model = decoder_only(position="none")
    script = torch.tensor([[1, 2, 3, 4, 5, 6], [2, 9, 9, 4, 2, 3], [8, 8, 8, 8, 8, 8]])
    prompt = torch.tensor([[2, 3], [1, 2], [1, 2]])

    def follow(tokens: Tensor, logits: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(script[:, tokens.shape[1] - 2], VOCAB).to(logits.dtype)

    def say(**options: object) -> list[list[int]]:
        steps = model.generate(prompt, processors=[follow], max_new_tokens=6, **options)
        return steps[:, 2:].tolist()

    assert say(stop_tokens=[4], pad_token=99) == [[1, 2, 3, 4, 99, 99], [2, 9, 9, 4, 99, 99], [8] * 6]
    assert say(stop_sequences=[(2, 3)], pad_token=0) == [[1, 2, 3, 0, 0, 0], [2, 9, 9, 4, 2, 3], [8] * 6]
    assert say(stop_sequences=[[2, 9], [8, 8, 8, 8]]) == [[1, 2, 3, 4, 5, 6], [2, 9, 0, 0, 0, 0], [8, 8, 8, 8, 0, 0]]
    assert say(stop_tokens=[8, 4, 9]) == [[1, 2, 3, 4], [2, 9, 8, 8], [8, 8, 8, 8]]


def test_configured_stop_and_pad_tokens_hold_where_a_call_gives_none() -> None:
    model = decoder_only(stop_tokens=tuple(range(VOCAB)), pad_token=7)
    assert model.generate(PROMPT, max_new_tokens=4).shape == (3, 6)
    assert model.generate(PROMPT, max_new_tokens=4, stop_tokens=()).shape == (3, 9)


def test_max_length_counts_the_prompt_of_each_row() -> None:
    out = decoder_only().generate(PROMPT, REAL, max_length=6, pad_token=99)[:, 5:]
    assert (out != 99).sum(-1).tolist() == [1, 3, 4]


def test_rows_that_are_done_take_no_positions() -> None:
    """Learned positions end at 24: finished rows do not run out of them while the others continue."""
    model = decoder_only("mha learned, after")
    prompt, real = ids(2, 22), padding([(0, 22), (20, 2)], 22)
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        out = model.generate(prompt, real, max_length=24, pad_token=99, **options)[:, 22:]
        assert (out != 99).sum(-1).tolist() == [2, 22]


def test_no_room_is_set_aside_for_tokens_that_may_never_come() -> None:
    stops = tuple(range(VOCAB))
    assert decoder_only().generate(PROMPT, max_new_tokens=2**62, stop_tokens=stops).shape == (3, 6)


def test_the_head_is_given_the_last_position_only() -> None:
    for model, prompt in ((decoder_only(), PROMPT), (encoder_decoder(), SOURCE)):
        given: list[tuple[int, ...]] = []
        model.head.register_forward_hook(lambda _, inputs, __, given=given: given.append(tuple(inputs[0].shape)))
        for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
            model.generate(prompt, max_new_tokens=3, **options)
        assert set(given) == {(3, 1, 16)}
        model.generate(prompt, max_new_tokens=3, num_beams=2)
        assert set(given) == {(3, 1, 16), (6, 1, 16)}


def test_each_token_is_read_once() -> None:
    """With caches a prompt is read once, in chunks of the size asked for, and then one token at a time."""
    model, widths = decoder_only(), []
    model.decoder.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    for options in ({}, {"prefill_chunk_size": 2}, {"use_cache": "auto"}, {"use_cache": False}):
        model.generate(PROMPT, max_new_tokens=3, **options)
    assert widths == [5, 1, 1, 2, 2, 1, 1, 1, 5, 1, 1, 5, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 1.0}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_conversation_is_one_text(variant: str, options: dict[str, object]) -> None:
    """Turn by turn on a live cache, the new turn's tokens alone, equals the whole text read anew for each turn."""
    model = decoder_only(variant).enable_cache()
    turns = [ids(2, 4, seed=turn) for turn in range(3)]
    text = torch.empty(2, 0, dtype=torch.int64)
    for turn, use_cache in zip(turns, (True, "auto", True), strict=True):
        answer = model.generate(turn, max_new_tokens=3, use_cache=use_cache, generator=seeded(), **options)
        text = torch.cat((text, turn), 1)
        whole = model.generate(text, max_new_tokens=3, use_cache=False, generator=seeded(), **options)
        assert torch.equal(answer, torch.cat((turn, whole[:, -3:]), 1))
        text = whole
        assert model.kv_cache.length == text.shape[1]


def test_a_single_token_on_a_live_conversation_with_auto() -> None:
    """ "auto" chooses whether to use caches; a conversation in the model continues with either choice."""
    text = decoder_only().generate(PROMPT, max_new_tokens=4)
    for count in (1, 2):
        model = decoder_only().enable_cache()
        model.generate(PROMPT, max_new_tokens=3, use_cache="auto")
        new = model.generate(text[:, 8:], max_new_tokens=count, use_cache="auto")
        assert torch.equal(new[:, 1], decoder_only().generate(text, max_new_tokens=1)[:, -1])
        assert model.kv_cache.length == 9 + count


def test_rows_of_a_conversation_that_stop_early_cache_no_padding() -> None:
    model = decoder_only().enable_cache()
    out = model.generate(PROMPT, REAL, max_new_tokens=6, stop_tokens=(3, 6), pad_token=99)[:, 5:]
    lengths = REAL.sum(1) + (out != 99).sum(1)
    assert len(set(lengths.tolist())) > 1
    assert torch.equal(model.kv_cache.lengths, lengths)


def raising_at(step: int) -> Callable[[Tensor, Tensor], Tensor]:
    def processor(tokens: Tensor, logits: Tensor) -> Tensor:
        if tokens.shape[1] == 5 + step:
            raise KeyboardInterrupt
        return logits

    return processor


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 1.0, "num_return_sequences": 2}])
def test_a_generate_that_raises_leaves_the_conversation(options: dict[str, object]) -> None:
    model = decoder_only("gqa rotary, window, both").enable_cache(max_length=12)
    model.generate(ids(3, 4), max_new_tokens=3)
    before = kept(model)
    for step in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPT, REAL, max_new_tokens=5, processors=[raising_at(step)], **options)
        assert kept(model) == before
    clean = decoder_only("gqa rotary, window, both").enable_cache(max_length=12)
    clean.generate(ids(3, 4), max_new_tokens=3)
    given = {"max_new_tokens": 4, **options}
    assert torch.equal(
        model.generate(PROMPT, REAL, generator=seeded(), **given),
        clean.generate(PROMPT, REAL, generator=seeded(), **given),
    )


def test_a_full_cache_leaves_the_conversation() -> None:
    model = decoder_only().enable_cache(max_length=10)
    model.generate(PROMPT, max_new_tokens=2)
    before = kept(model)
    with pytest.raises(CacheFullError):
        model.generate(ids(3, 1), max_new_tokens=3)
    assert kept(model) == before
    model.generate(ids(3, 1), max_new_tokens=2)
    assert model.kv_cache.length == 10


def test_an_encoder_decoder_that_raises_keeps_its_target() -> None:
    model = encoder_decoder().enable_cache()
    model.generate(SOURCE, max_new_tokens=3)
    before = kept(model)

    def fail(tokens: Tensor, logits: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(SOURCE[:1], max_new_tokens=3, processors=[fail])
    assert kept(model) == before


def test_refusals_before_any_work() -> None:
    """Nothing is read: neither by the decoder nor by the encoder."""
    wrong = [
        (ArgumentError, {"temperature": float("nan")}),
        (ArgumentError, {"max_new_tokens": None}),
        (ArgumentError, {"max_new_tokens": None, "max_length": 1}),
        (ArgumentError, {"num_beams": 2, "temperature": [1.0, 0.0, 1.0]}),
        (ArgumentError, {"num_return_sequences": 2}),
        (ArgumentError, {"generator": 7}),
    ]
    for model, prompt in ((decoder_only(), PROMPT), (encoder_decoder(), SOURCE)):
        for part in model.modules():
            part.register_forward_pre_hook(lambda *_: pytest.fail("something was read"))
        for error, options in wrong:
            for call in (model.generate, model.stream):
                with pytest.raises(error):
                    call(prompt, **{"max_new_tokens": 3, **options})
        with pytest.raises(ArgumentError, match=r"^num_beams: expected 1, since"):
            model.stream(prompt, max_new_tokens=2, num_beams=2)
        model.train()
        with pytest.raises(ArgumentError, match=r"eval\(\)"):
            model.generate(prompt, max_new_tokens=2)
        model.eval().enable_cache(layers=[1])
        with pytest.raises(ArgumentError, match=r"expected caches in all layers"):
            model.generate(prompt, max_new_tokens=2)
    model = decoder_only()
    for error, given in (
        (ShapeError, (PROMPT, REAL[:2])),
        (DeviceError, (PROMPT, REAL.to("meta"))),
        (DtypeError, (PROMPT.float(), REAL)),
    ):
        with pytest.raises(error):
            model.generate(*given, max_new_tokens=2)


def test_another_number_of_rows_than_the_conversation_has() -> None:
    model = decoder_only().enable_cache()
    model.generate(PROMPT, max_new_tokens=2)
    before = kept(model)
    for call in (model.generate, model.stream):
        with pytest.raises(ShapeError, match=r"input_ids: expected 3 rows, as the conversation"):
            call(PROMPT[:2], max_new_tokens=2)
    assert kept(model) == before


def test_auto_reads_without_caches_where_only_some_layers_keep_theirs() -> None:
    model = decoder_only().enable_cache(layers=[0])
    expected = decoder_only().generate(PROMPT, max_new_tokens=3)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=3, use_cache="auto"), expected)


def test_tokens_may_be_learned_from() -> None:
    """Issues: transformers#32681. What inference mode has made could not be used later."""
    for model, prompt in ((decoder_only(), PROMPT), (encoder_decoder(), SOURCE)):
        for options in ({}, {"num_beams": 2}):
            out = model.generate(prompt, max_new_tokens=3, **options)
            given = (out,) if prompt is PROMPT else (prompt, out)
            model(*given).sum().backward()
        (first,) = islice(model.stream(prompt, max_new_tokens=3), 1)
        assert not first.is_inference()
