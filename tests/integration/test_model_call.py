"""Generation by calls of the model: hooks fire once per step, and compiled forwards are used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding
from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer
from transformer.generation import generate, stream

PROMPT, SOURCE, TURN = ids(2, 4), ids(2, 5, VOCAB + 2), ids(2, 3, seed=5)
REAL, SOURCE_REAL = padding([(0, 4), (1, 3)], 4), padding([(0, 5), (0, 3)], 5)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Calls:
    """Counts how often hooks of a module fire, before and after its forward."""

    def __init__(self, module: nn.Module) -> None:
        self.given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.came: list[Tensor] = []
        module.register_forward_pre_hook(lambda _, given, named: self.given.append((given, named)), with_kwargs=True)
        module.register_forward_hook(lambda _, given, out: self.came.append(out))

    @property
    def ids(self) -> Tensor:
        """The tokens of all calls, side by side."""
        return torch.cat([given[0] if given else named["input_ids"] for given, named in self.given], 1)


STEPS: dict[str, tuple[dict[str, Any], int]] = {
    "caches of its own": ({}, 6),
    "no caches": ({"use_cache": False}, 6),
    "prompt in parts": ({"prefill_chunk_size": 2}, 7),
    "sampling": ({"temperature": 1.0}, 6),
    "several samples": ({"temperature": 1.0, "num_return_sequences": 2}, 6),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("streamed", [False, True])
def test_hooks_fire_once_a_step(name: str, streamed: bool) -> None:
    given, steps = STEPS[name]
    model = decoder_only()
    calls, stacks = Calls(model), Calls(model.decoder)
    if streamed:
        list(model.stream(PROMPT, max_new_tokens=6, **given))
    else:
        model.generate(PROMPT, max_new_tokens=6, **given)
    assert len(calls.given) == len(calls.came) == len(stacks.came) == steps


def test_hooks_see_each_token_once() -> None:
    """And logits of nothing but the last column."""
    model = decoder_only()
    calls = Calls(model)
    out = model.generate(PROMPT, max_new_tokens=6)
    assert_same(calls.ids, out[:, :-1])
    assert [came.shape[1] for came in calls.came] == [1] * 6


def test_hooks_over_a_live_conversation() -> None:
    """It reads the last token too."""
    model = decoder_only().enable_cache()
    calls = Calls(model)
    out = model.generate(PROMPT, max_new_tokens=5)
    assert len(calls.came) == 6
    assert_same(calls.ids, out)
    next(model.stream(TURN, max_new_tokens=5))
    assert len(calls.came) == 8


@pytest.mark.parametrize("given", [{"num_beams": 3}, {"num_beams": 2, "use_cache": False}], ids=str)
@pytest.mark.parametrize("live", [False, True])
def test_hooks_in_a_beam_search(given: dict[str, Any], live: bool) -> None:
    model = decoder_only()
    if live:
        model.enable_cache()
    calls, stacks = Calls(model), Calls(model.decoder)
    model.generate(PROMPT, max_new_tokens=4, **given)
    assert len(calls.came) == len(stacks.came) >= 4


@pytest.mark.parametrize("given", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("streamed", [False, True])
def test_hooks_of_an_encoder_decoder(given: dict[str, Any], streamed: bool) -> None:
    """The source is read by a call of the model too, so that generation never goes past its forward."""
    model = encoder_decoder()
    root, encoder, decoder = Calls(model), Calls(model.encoder), Calls(model.decoder)
    if streamed and "num_beams" not in given:
        list(model.stream(SOURCE, SOURCE_REAL, max_new_tokens=5, **given))
    else:
        model.generate(SOURCE, SOURCE_REAL, max_new_tokens=5, **given)
    assert len(encoder.came) == 1
    assert len(decoder.came) >= 5
    assert len(root.came) == len(encoder.came) + len(decoder.came)


@pytest.mark.parametrize("given", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_what_a_hook_makes_of_the_logits_is_what_counts(given: dict[str, Any]) -> None:
    def favour(model: nn.Module, _: object, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([7]), 1e3)

    for model, prompt in ((decoder_only(), PROMPT), (encoder_decoder(), SOURCE)):
        handle = model.register_forward_hook(lambda m, i, out: favour(m, i, out) if out.shape[-1] == VOCAB else None)
        assert (model.generate(prompt, max_new_tokens=4, **given)[:, -4:] == 7).all()
        handle.remove()
        assert not (model.generate(prompt, max_new_tokens=4, **given)[:, -4:] == 7).all()


# --- compiled forwards ------------------------------------------------------------------------------------------------


class Counting:
    """A backend of one's own: runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            self.ran += 1
            return graph.forward(*given)

        return run


def compile_in_place(model: nn.Module, backend: Counting) -> None:
    model.compile(backend=backend)


def compile_forward(model: nn.Module, backend: Counting) -> None:
    model.forward = torch.compile(model.forward, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [compile_in_place, compile_forward])
@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
def test_compiled_forwards_are_used(compiled: Callable[..., None], build: Callable[..., nn.Module]) -> None:
    """With equal tokens, cached or not; without caches everything is in graphs."""
    model, plain, backend = build(), build(), Counting()
    prompt, real = (PROMPT, REAL) if build is decoder_only else (SOURCE, SOURCE_REAL)
    compiled(model, backend)
    expected = plain.generate(prompt, max_new_tokens=4)
    assert_same(model.generate(prompt, max_new_tokens=4, use_cache=False), expected)
    assert backend.ran >= 4
    assert_same(model.generate(prompt, max_new_tokens=4), expected)
    assert_same(model.generate(prompt, real, max_new_tokens=4), plain.generate(prompt, real, max_new_tokens=4))
    came = list(islice(model.stream(prompt, max_new_tokens=4), 3))
    assert_same(came, list(islice(plain.stream(prompt, max_new_tokens=4), 3)))


@pytest.mark.parametrize("given", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
def test_a_forward_that_was_replaced_is_used(given: dict[str, Any], build: Callable[..., nn.Module]) -> None:
    """As accelerate does: one of the instance's own, around the class's."""
    model, calls = build(), []
    before, stack = model.forward, Calls(model.decoder)

    def forward(*args: Any, **named: Any) -> Tensor:
        calls.append(named)
        return before(*args, **named)

    model.forward = forward
    prompt = PROMPT if build is decoder_only else SOURCE
    assert_same(model.generate(prompt, max_new_tokens=4, **given), build().generate(prompt, max_new_tokens=4, **given))
    assert len(calls) == len(stack.came) + (build is encoder_decoder)


# --- forward ----------------------------------------------------------------------------------------------------------


def described(forward: Callable[..., Tensor]) -> list[tuple[str, str, object]]:
    """Name, kind and default of each argument."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return [(p.name, p.kind.name, p.default) for p in parameters if p.kind is not p.VAR_KEYWORD]


def test_signatures() -> None:
    """In addition, `**unused` takes arguments that wrappers for transformers pass as None (test_peft.py)."""
    given, named = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"
    assert described(DecoderOnlyTransformer.forward) == [
        ("input_ids", given, None),
        ("attention_mask", given, None),
        ("expanding_context", given, None),
        ("inputs_embeds", named, None),
        ("segment_ids", named, None),
        ("prefix_lengths", named, None),
        ("position_ids", named, None),
        ("labels", named, None),
        ("logits_to_keep", named, 0),
        ("output_attentions", named, None),
        ("output_hidden_states", named, None),
    ]
    assert described(EncoderDecoderTransformer.forward) == [
        ("source_ids", given, None),
        ("target_ids", given, None),
        ("source_mask", given, None),
        ("target_mask", given, None),
        ("encoder_hidden_states", named, None),
        ("inputs_embeds", named, None),
        ("labels", named, None),
        ("logits_to_keep", named, 0),
        ("output_attentions", named, None),
        ("output_hidden_states", named, None),
    ]


class WithoutKeep(nn.Module):
    """It would fail if it were given more than it names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.named = model, []

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(tokens, attention_mask)


class WithKeep(WithoutKeep):
    """It names the option."""

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0) -> Tensor:
        self.named.append(logits_to_keep)
        return self.model(tokens, attention_mask, logits_to_keep=logits_to_keep)


class WithAnything(WithoutKeep):
    """Its forward accepts any arguments without names."""

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
        self.named.append(more)
        return self.model(tokens, attention_mask, **more)


@pytest.mark.parametrize(
    ("wrapper", "expected"), [(WithoutKeep, []), (WithKeep, [1, 1, 1]), (WithAnything, [{}, {}, {}])]
)
def test_logits_to_keep_is_given_where_forward_names_it(wrapper: type[WithoutKeep], expected: list[object]) -> None:
    model, plain = wrapper(decoder_only()).eval(), decoder_only().generate(PROMPT, max_new_tokens=3)
    assert_same(generate(model, PROMPT, max_new_tokens=3), plain[:, 4:])
    assert model.named == expected
    model.named.clear()
    assert_same(torch.stack(list(stream(model, PROMPT, max_new_tokens=3)), 1), plain[:, 4:])
    assert model.named == expected
