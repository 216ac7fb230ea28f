"""Options of each row: a row of a batch is written as if it were alone, whatever the others want."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding
from transformer.errors import ArgumentError
from transformer.generation import GenerationOptions, generate, stream

PROMPT, REAL = ids(3, 5), padding([(0, 5), (2, 3), (0, 2)], 5)
SOURCE = ids(3, 5, VOCAB + 2, seed=2)

OPTIONS: dict[str, dict[str, list]] = {
    "lengths": {"max_new_tokens": [3, 9, 1]},
    "temperatures": {"temperature": [0.0, 1.5, 0.7], "seed": [1, 2, 3]},
    "filters": {"temperature": [2.0, 2.0, 2.0], "top_k": [3, 0, 5], "top_p": [1, 0.5, 0.9], "seed": [7, 7, 7]},
    "min_p": {"temperature": [1.0, 3.0, 2.0], "min_p": [0, 0.2, 0.4], "seed": [4, 5, 6]},
    "penalties": {"repetition_penalty": [1.0, 1.8, 0]},
    "stop tokens": {"stop_tokens": [[1, 2, 3], [], [4, 6, 8]]},
    "stop sequences": {"stop_sequences": [[], [[1]], [[3], [4, 4], [6]]]},
}


def row_of(options: dict[str, list], row: int) -> dict[str, object]:
    return {name: values[row] for name, values in options.items()}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
def test_a_row_alone(build, name: str, beams: int) -> None:
    options = OPTIONS[name]
    if beams > 1 and "temperature" in options:
        options = options | {"temperature": [1.0, 1.5, 0.7]}
    model, prompt = build(), PROMPT if build is decoder_only else SOURCE
    given = {"pad_token": 99, "num_beams": beams, **({} if "max_new_tokens" in options else {"max_new_tokens": 6})}
    together, streamed = new_tokens(model, prompt, REAL, **given, **options), None
    if beams == 1:
        streamed = torch.stack(list(model.stream(prompt, REAL, **given, **options)), 1)
        assert torch.equal(streamed, together)
    for row in range(3):
        own = prompt[row : row + 1, REAL[row]]
        for use_cache in (True, False):
            alone = new_tokens(model, own, None, **given, **row_of(options, row), use_cache=use_cache)
            assert torch.equal(together[row : row + 1, : alone.shape[1]], alone)
            assert (together[row, alone.shape[1] :] == 99).all()


def new_tokens(model: nn.Module, prompt: Tensor, real: Tensor | None, **options: object) -> Tensor:
    skip = prompt.shape[1] if type(model) is type(decoder_only()) else 0
    return model.generate(prompt, real, **options)[:, skip:]


def test_a_seed_is_of_its_row() -> None:
    """Whatever its place and neighbours; copy i has the seed + i; the global generator is not used."""
    model, given = decoder_only(), {"max_new_tokens": 8, "temperature": 2.0}
    before = torch.get_rng_state()
    whole = generate(model, PROMPT, seed=[5, 6, 5], **given)
    turned = generate(model, PROMPT[[2, 0, 1]], seed=[5, 5, 6], **given)
    assert torch.equal(turned, whole[[2, 0, 1]])
    assert torch.equal(generate(model, PROMPT, seed=5, **given)[[0, 2]], whole[[0, 2]])
    same = generate(model, PROMPT[[0, 0]], seed=5, **given)
    assert torch.equal(same[0], same[1])
    copies = generate(model, PROMPT, seed=[5, 60, 70], num_return_sequences=3, **given)
    for row, seed in enumerate((5, 60, 70)):
        for copy in range(3):
            alone = generate(model, PROMPT[row : row + 1], seed=seed + copy, **given)
            assert torch.equal(copies[3 * row + copy], alone[0])
    assert len({tuple(row) for row in copies.tolist()}) == 9
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_is_that_of_a_generator() -> None:
    for beams in (1, 3):
        given = {"max_new_tokens": 8, "temperature": 2.0, "num_beams": beams}
        alone = generate(decoder_only(), PROMPT[:1], seed=9, **given)
        generator = torch.Generator().manual_seed(9)
        assert torch.equal(generate(decoder_only(), PROMPT[:1], generator=generator, **given), alone)


def test_the_processors_of_the_user_see_all_rows_at_once() -> None:
    seen = []

    def keep(tokens: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.shape[0])
        return scores

    generate(decoder_only(), PROMPT, max_new_tokens=2, processors=[keep], repetition_penalty=[1.2, 1.3, 1.4])
    assert seen == [3, 3]


def test_rows_of_a_conversation() -> None:
    """Each row has read its own tokens, as many as it got."""
    model = decoder_only().enable_cache()
    out = model.generate(PROMPT, REAL, max_new_tokens=[1, 4, 2], pad_token=99)
    assert model.kv_cache.lengths.tolist() == [6, 7, 4]
    turn = ids(3, 2, seed=4)
    real = torch.cat((REAL, out[:, 5:] != 99, torch.ones(3, 2).bool()), 1)
    whole = torch.cat((out.clamp(max=VOCAB - 1), turn), 1)
    with torch.no_grad():
        torch.testing.assert_close(model(turn), decoder_only()(whole, real)[:, -2:], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("temperature", {"temperature": [1.0]}),
        ("temperature", {"temperature": []}),
        ("top_k", {"top_k": [1, 2]}),
        ("max_new_tokens", {"max_new_tokens": [1, 2, 0]}),
        ("max_new_tokens", {"max_new_tokens": [1, 2, 3, 4]}),
        ("seed", {"seed": [1, 2, -3]}),
        ("seed", {"seed": [1, 2, "3"]}),
        ("max_new_tokens", {"max_new_tokens": [1, 2, None]}),
        ("seed", {"seed": 2**63}),
        ("seed", {"seed": 1.0}),
        ("seed, generator", {"seed": 1, "generator": torch.Generator()}),
        ("stop_tokens", {"stop_tokens": [[1], [2]]}),
        ("stop_tokens", {"stop_tokens": [[1], [2], 3]}),
        ("stop_tokens", {"stop_tokens": [[1], [2], [[3]]]}),
        ("stop_sequences", {"stop_sequences": [[1], [[2]], [[3]]]}),
        ("stop_sequences", {"stop_sequences": [[], [], []]}),
        ("stop_strings", {"stop_strings": [["a"], "b", ["c"]]}),
        ("num_return_sequences", {"temperature": [1.0, 0.0, 1.0], "num_return_sequences": 2}),
        ("temperature", {"temperature": [1.0, 0.0, 1.0], "num_beams": 2}),
    ],
)
def test_refusals(name: str, options: dict[str, object]) -> None:
    """Before anything is read: of a value, of another number of rows than there are, and of what is unclear."""
    model = decoder_only()
    model.register_forward_pre_hook(lambda *_: pytest.fail("something was read"))
    for call in (generate, lambda *a, **o: list(islice(stream(*a, **o), 1))):
        with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
            call(model, PROMPT, **{"max_new_tokens": 2, **options})


def test_options_of_one_row() -> None:
    given = GenerationOptions(max_new_tokens=[1, 2], temperature=0.5, stop_tokens=[[3], [4, 5]], top_k=[7, 0])
    first, second = given.rows(2)
    assert (first.max_new_tokens, first.stop_tokens, first.top_k, first.temperature) == (1, (3,), 7, 0.5)
    assert (second.max_new_tokens, second.stop_tokens, second.top_k, second.temperature) == (2, (4, 5), 0, 0.5)
    assert GenerationOptions(max_new_tokens=1).rows(3) == GenerationOptions(max_new_tokens=1).rows(1) * 3
    assert given.limits([4, 4]) == [1, 2]
    assert given.padding == 3
