"""Refusals before anything is read: rows that become too long, unknown names, and extreme numbers."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding
from transformer.errors import ArgumentError, CacheFullError
from transformer.generation import GenerationOptions, generate, stream
from transformer.generation.keywords import NAMES_ELSEWHERE, NOWHERE_HERE
from transformer.models import DecoderOnlyTransformer, EncoderDecoderTransformer

MOST = 16
PROMPT, REAL = ids(2, 6), padding([(0, 6), (2, 4)], 6)


def learned() -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(VOCAB, 16, 4, 32, 2, position="learned", max_length=MOST).eval()


def pair() -> EncoderDecoderTransformer:
    torch.manual_seed(0)
    return EncoderDecoderTransformer(VOCAB, VOCAB, 16, 4, 32, 2, position="learned", max_length=MOST).eval()


def nothing_is_read(model: nn.Module) -> None:
    for part in model.modules():
        part.register_forward_pre_hook(lambda *_: pytest.fail("something was read"))


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(tokens, attention_mask)


WAYS: dict[str, Callable[..., Tensor]] = {
    "generate": lambda m, *given, **options: m.generate(*given, **options),
    "stream": lambda m, *given, **options: torch.stack(list(m.stream(*given, **options)), 1),
    "wrapped": lambda m, *given, **options: generate(Wrapper(m), *given, **options),
}
OPTIONS = [{}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"temperature": 1.0, "num_return_sequences": 2}]


@pytest.mark.parametrize("options", [*OPTIONS, {"num_beams": 2}])
@pytest.mark.parametrize("way", WAYS)
def test_learned_positions_end(way: str, options: dict[str, object]) -> None:
    """The last token need not be read; one more is refused before any work, in `max_length` as well."""
    if way == "stream" and "num_beams" in options:
        return
    model = learned()
    assert WAYS[way](model, PROMPT, max_new_tokens=MOST - 6 + 1, **options).shape[1] >= MOST - 6 + 1
    nothing_is_read(model)
    for asked, real in ((MOST - 6 + 2, None), (MOST - 6 + 2, REAL), (10**9, REAL), (2**70, None)):
        with pytest.raises(ArgumentError, match=rf"^max_new_tokens: expected at most {MOST - 6 + 1} .*{MOST} tokens"):
            WAYS[way](model, PROMPT, real, max_new_tokens=asked, **options)
    with pytest.raises(ArgumentError, match=r"^max_new_tokens: "):
        WAYS[way](model, PROMPT, max_length=MOST + 2, **options)


def test_a_conversation_reads_its_last_token() -> None:
    model = learned().enable_cache()
    model.generate(PROMPT, REAL, max_new_tokens=3)
    with pytest.raises(ArgumentError, match=r"^max_new_tokens: expected at most 5 "):
        model.generate(PROMPT[:, :2], max_new_tokens=6)
    with pytest.raises(ArgumentError, match=r"^max_new_tokens: expected at most 5 "):
        model.stream(PROMPT[:, :2], max_new_tokens=6)
    assert model.kv_cache.length == 9
    model.generate(PROMPT[:, :2], max_new_tokens=5)
    assert model.kv_cache.length == MOST
    assert model.generate(PROMPT, max_new_tokens=MOST - 5, use_cache=False).shape[1] == MOST + 1, "read anew"


def test_targets_of_an_encoder_decoder() -> None:
    model = pair()
    for options in (*OPTIONS, {"num_beams": 2}):
        assert model.generate(PROMPT, max_new_tokens=MOST, **options).shape[1] <= MOST
    model.enable_cache()
    model.generate(PROMPT, max_new_tokens=MOST - 1)
    nothing_is_read(model)
    for call in (model.generate, model.stream):
        with pytest.raises(ArgumentError, match=rf"^max_new_tokens: expected at most {MOST - 1} .*{MOST} tokens"):
            call(PROMPT, max_new_tokens=MOST)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 1.0, "num_return_sequences": 2}])
def test_a_cache_of_a_fixed_size(options: dict[str, object]) -> None:
    """Its own error says that it is full; without it, and with windows, nothing bounds a row."""
    model = decoder_only("mha none").enable_cache(max_length=12)
    model.generate(PROMPT, REAL, max_new_tokens=2)
    before = model.kv_cache.length
    nothing_is_read(model)
    with pytest.raises(CacheFullError, match=r"^max_new_tokens: expected at most 3 .*at most 12 tokens, got 4"):
        model.generate(PROMPT[:, :1], max_new_tokens=4, **options)
    assert model.kv_cache.length == before


def test_windows_have_no_end() -> None:
    model = DecoderOnlyTransformer(VOCAB, 16, 4, 32, 2, window_size=5).eval().enable_cache(max_length=12)
    assert model.generate(PROMPT, max_new_tokens=40).shape[1] == 46


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("do_sample", "temperature"),
        ("eos_token_id", "stop_tokens"),
        ("pad_token_id", "pad_token"),
        ("max_tokens", "max_new_tokens"),
        ("streamer", r"stream\(\)"),
        ("logits_processor", "processors"),
        ("max_new_token", "max_new_tokens"),
        ("top_kk", "top_k"),
        ("temprature", "temperature"),
        ("beams", "num_beams"),
        ("progress", "prompt_progress_callback"),
        ("cache_dtype", r"it to model\.enable_cache\(\), of which it is an option"),
        ("cache_budget", r"it to model\.enable_cache\(\), of which it is an option"),
        ("xyz", "one of max_new_tokens"),
    ],
)
def test_an_unknown_option_names_the_right_one(name: str, words: str) -> None:
    for model in (decoder_only(), encoder_decoder()):
        nothing_is_read(model)
        for call in (model.generate, model.stream):
            with pytest.raises(ArgumentError, match=rf"^{name}: expected an option.*give {words}"):
                call(PROMPT, max_new_tokens=1, **{name: 1})
    for call in (generate, stream):
        with pytest.raises(ArgumentError, match=rf"^{name}: expected an option.*give {words}"):
            call(decoder_only(), PROMPT, max_new_tokens=1, **{name: 1})


def test_every_option_of_transformers_has_an_answer() -> None:
    """Never the option with the nearest name: `diversity_penalty` is no `length_penalty`, `bos_token_id` no stop."""
    theirs = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    theirs |= inspect.signature(transformers.GenerationMixin.generate).parameters.keys() - {"self", "kwargs"}
    ours = {field.name for field in dataclasses.fields(GenerationOptions)}
    assert not theirs - ours - NAMES_ELSEWHERE.keys() - NOWHERE_HERE
    assert not NOWHERE_HERE & (ours | NAMES_ELSEWHERE.keys())
    for name in sorted(NOWHERE_HERE):
        with pytest.raises(
            ArgumentError, match=rf"^{name}: expected an option.* got one of transformers; leave it out$"
        ):
            decoder_only().generate(PROMPT, max_new_tokens=1, **{name: 1})
    for instead in NAMES_ELSEWHERE.values():
        for processor in re.findall(r"transformers\.(\w+)", instead):
            assert callable(getattr(transformers, processor))


# --- numbers ----------------------------------------------------------------------------------------------------------

HUGE = [2**63, 10**400, 10**5000, -(10**5000)]
OTHERS = [[1], "1", b"1", object(), np.int64(1), np.float32(0.5), torch.tensor(1), 1 + 0j]
NAMES = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "max_time",
    "seed",
    "forced_bos_token_id",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "pad_token",
    "num_beams",
    "length_penalty",
    "num_return_sequences",
    "prefill_chunk_size",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [*HUGE, *OTHERS], ids=lambda value: f"{type(value).__name__}")
def test_numbers_of_any_size_and_what_is_none(name: str, value: object) -> None:
    """Tokens, or an error that names the option; nothing else, and nothing that takes for ever."""
    how = {"top_k": 1.0, "top_p": 1.0, "min_p": 1.0, "typical_p": 1.0, "temperature": 1.0, "num_return_sequences": 1.0}
    options: dict[str, object] = {"max_new_tokens": 2, "temperature": how.get(name, 0), "stop_tokens": (3,)}
    if name == "max_length":
        del options["max_new_tokens"]
    if name in ("max_new_tokens", "max_length"):
        options["stop_tokens"] = range(VOCAB)
    options[name] = value
    out, refused = None, ""
    try:
        out = decoder_only().generate(PROMPT, **options)
    except ArgumentError as error:
        refused = str(error)
    if out is None:
        assert name in refused.split(":")[0]
        assert len(refused) < 600
    else:
        assert type(value) is int, "what is no number is refused"
        assert ((out >= 0) & (out < VOCAB)).all()


@pytest.mark.parametrize("name", ["stop_tokens", "stop_sequences"])
@pytest.mark.parametrize("value", [[2**63], [10**5000], [np.int64(3)], [[np.int64(3)]], [3.0], [None], [[2**70]], 3])
def test_ids_that_no_tensor_holds(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=r"^stop_(tokens|sequences)"):
        decoder_only().generate(PROMPT, max_new_tokens=1, **{name: value})


@pytest.mark.parametrize("given", [PROMPT.tolist(), PROMPT.numpy(), 3, "text"])
def test_ids_that_are_no_tensor(given: object) -> None:
    for model in (decoder_only(), encoder_decoder()):
        for call in (model.generate, model.stream):
            with pytest.raises(ArgumentError, match=r"_ids: expected a tensor.*, got .*; give torch.as_tensor\(ids\)"):
                call(given, max_new_tokens=1)
