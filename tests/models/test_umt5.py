"""T5 and UMT5 with transformers' weights: the same logits and tokens, also with a cache of the caller."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from tests.models.t5_family import HEADS, PAD, VOCABULARY, WIDTH, ids, pair
from tests.peers.models import no_float32
from tests.setups import padding
from transformer.errors import ArgumentError, AttentionError, CacheFullError, ConfigurationError, DtypeError, ShapeError
from transformer.models import UMT5Cache, UMT5Config, UMT5Model, init_cache, umt5_config

FAMILIES = ["t5", "t5 1.1", "umt5"]
PADDING = [(0, 11), (4, 7), (0, 5)]
close = partial(torch.testing.assert_close, rtol=0)


@pytest.mark.parametrize("layers", [(2, 3), (3, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, layers: tuple[int, int]) -> None:
    """Over sources without padding, and with it on either side; in float64 throughout, and in float32 with an error of
    at most twice theirs, whose own is 1e-5 in numbers up to 4."""
    both = pair(family, encoders=layers[0], decoders=layers[1])
    source, target, mask = ids(3, 11), ids(3, 14, seed=1), padding(PADDING, 11)
    with torch.no_grad():
        exact_model = copy.deepcopy(both.ours).double()
        for given in (None, mask):
            exact = exact_model(source, target, given)
            theirs = both.expected(source, target, None if given is None else given.long())
            error, their_error = ((each - exact).abs().max() for each in (both.ours(source, target, given), theirs))
            assert error <= 2 * their_error + 1e-7
            assert their_error < 2e-5, "the same model"
        both.theirs.double()
        with no_float32():
            expected = both.expected(source, target, mask.long())
        close(both.ours.double()(source, target, mask), expected, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family: str) -> None:
    """64 of them, with caches and without; a padded row writes what it writes alone."""
    both = pair(family)
    source, mask = ids(3, 11), padding(PADDING, 11)
    expected = both.written(source, 64, mask.long())
    assert expected.shape == (3, 64)
    assert len(expected.unique()) > 5, "a model that repeats one token would show nothing"
    for use_cache in (True, False):
        assert torch.equal(both.ours.generate(source, mask, max_new_tokens=64, use_cache=use_cache), expected)
    for row in (1, 2):
        alone = both.ours.generate(source[row : row + 1, mask[row]], max_new_tokens=64)
        assert torch.equal(alone, expected[row : row + 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_tokens_and_beams(family: str) -> None:
    """The end of a row, its padding, and the best of three candidates of each row."""
    both = pair(family, stops=True)
    source, mask = ids(3, 11), padding(PADDING, 11)
    beams = {"num_beams": 3, "length_penalty": 0.5}
    for options, theirs in (({}, {}), (beams, {**beams, "early_stopping": "never"})):
        expected = both.written(source, 12, mask.long(), **theirs)
        for use_cache in (True, False):
            out = both.ours.generate(source, mask, max_new_tokens=12, pad_token=PAD, use_cache=use_cache, **options)
            assert torch.equal(out, expected)


def umt5() -> UMT5Model:
    model = pair("umt5").ours
    assert isinstance(model, UMT5Model)
    return model


def empty_cache(model: UMT5Model, length: int = 12) -> UMT5Cache:
    return init_cache(model.config, 2, length, 9)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1] * 12, [5, 1, 4, 2], [12]])
def test_a_cache_in_hand(lengths: list[int]) -> None:
    """Parts of a target in sequence give the results of the whole target; and the cache shows its tokens."""
    model = umt5()
    cache = empty_cache(model)
    source, target, mask = ids(2, 9), ids(2, 12, seed=1), padding([(0, 9), (3, 6)], 9)
    states = model.encoder(source, mask)
    read, parts = 0, []
    for part in target.split(lengths, 1):
        parts.append(model.decoder(part, states, mask, cache=cache, use_cache=True))
        read += part.shape[1]
        assert cache.position == read
        assert all(layer["key"].shape == (2, HEADS, read, 7) for layer in cache.self_attention)
        assert all(layer["value"].shape == (2, HEADS, 9, 7) for layer in cache.cross_attention)
    logits = model.lm_head(torch.cat(parts, 1))
    close(logits, model(source, target, mask), atol=1e-5)
    close(logits, model.lm_head(model.decoder(target, states, mask)), atol=1e-5)
    assert model.transformer.kv_cache is None, "nothing of it stays in the model"
    with pytest.raises(CacheFullError):
        model.decoder(target[:, :1], states, mask, cache=cache, use_cache=True)
    assert cache.position == 12


@torch.no_grad()
def test_a_cache_has_its_room_at_once() -> None:
    cache = empty_cache(umt5())
    buffers = [layer.nbytes for layer in cache.self_attention]
    assert buffers == [2 * 2 * HEADS * 12 * 7 * 4] * 3
    model, states = umt5(), torch.randn(2, 9, WIDTH)
    for column in ids(2, 12).split(1, 1):
        model.decoder(column, states, cache=cache, use_cache=True)
    assert [layer.nbytes for layer in cache.self_attention] == buffers


@torch.no_grad()
def test_another_source_is_never_answered_from_the_first() -> None:
    """Two conversations take turns on one model; and in one of them the source changes on the way."""
    model = umt5()
    first, second = (model.encoder(ids(2, 9, seed=seed)) for seed in (3, 4))
    target = ids(2, 4, seed=1)
    caches = {id(first): empty_cache(model), id(second): empty_cache(model)}
    for index, column in enumerate(target.split(1, 1)):
        for states in (first, second):
            out = model.decoder(column, states, cache=caches[id(states)], use_cache=True)
            close(out, model.decoder(target, states)[:, index : index + 1], atol=1e-5)
    cache = empty_cache(model)
    model.decoder(target[:, :1], first, cache=cache, use_cache=True)
    alone = model.decoder(target[:, :1], second, cache=empty_cache(model), use_cache=True)
    assert not torch.equal(alone, model.decoder(target[:, :1], first))
    for layer in cache.self_attention:
        layer.clear()
    close(model.decoder(target[:, :1], second, cache=cache, use_cache=True), alone, atol=1e-6)
    both = [model.generate(ids(2, 9, seed=seed), max_new_tokens=8) for seed in (3, 4, 3)]
    assert torch.equal(both[0], both[2])
    assert not torch.equal(both[0], both[1])


def test_what_a_decoder_refuses() -> None:
    """Before anything changes: the cache then continues as without the refused call."""
    model, target = umt5(), ids(2, 4)
    with torch.no_grad():
        states = model.encoder(ids(2, 9))
        cache = empty_cache(model)
        read = partial(model.decoder, cache=cache, use_cache=True)
        read(target[:, :2], states)
        for error, name, call in (
            (ArgumentError, "use_cache", lambda: model.decoder(target, states, use_cache=True)),
            (ArgumentError, "use_cache", lambda: model.decoder(target, states, cache=cache)),
            (ArgumentError, "decoder_input_ids", lambda: read(target + VOCABULARY, states)),
            (ShapeError, "encoder_states", lambda: read(target, states[:, 1:])),
            (ShapeError, "encoder_states", lambda: read(target[:1], states[:1])),
            (ShapeError, "rows", lambda: read(target[:1], states)),
            (DtypeError, "float64", lambda: model.decoder(target, states.double(), cache=cache, use_cache=True)),
        ):
            with pytest.raises(error, match=name):
                call()
        model.train()
        with pytest.raises(ArgumentError, match=r"eval\(\)"):
            read(target[:, 2:], states)
        model.eval()
        close(read(target[:, 2:], states), model.decoder(target, states)[:, 2:], atol=1e-5)


@torch.no_grad()
def test_errors_name_the_arguments_of_this_model() -> None:
    """And not those of the encoder-decoder in it."""
    model, tokens = umt5(), ids(2, 4)
    states, floats, hidden = model.encoder(tokens), torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.bool)
    for name, call in (
        ("input_ids", lambda: model([[1]], tokens)),
        ("input_ids", lambda: model.encoder(tokens + VOCABULARY)),
        ("input_ids", lambda: model.generate(tokens.tolist(), max_new_tokens=1)),
        ("input_ids", lambda: model.stream(tokens.float(), max_new_tokens=1)),
        ("decoder_input_ids", lambda: model(tokens, None)),
        ("attention_mask", lambda: model(tokens, tokens, floats)),
        ("attention_mask", lambda: model.encoder(tokens, floats)),
        ("attention_mask", lambda: model.decoder(tokens, states, floats)),
        ("attention_mask", lambda: model.generate(tokens, floats, max_new_tokens=1)),
        ("attention_mask", lambda: model.stream(tokens, hidden, max_new_tokens=1)),
        ("decoder_attention_mask", lambda: model(tokens, tokens, None, floats)),
        ("decoder_attention_mask", lambda: model.decoder(tokens, states, None, floats)),
        ("encoder_states", lambda: model.decoder(tokens, tokens)),
    ):
        with pytest.raises(AttentionError, match=rf"^{name}: expected"):
            call()


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_decoder_length": -1}, {"encoder_length": 1.5}])
def test_what_a_cache_refuses(wrong: dict[str, object]) -> None:
    sizes = {"batch_size": 1, "max_decoder_length": 2, "encoder_length": 3} | wrong
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        init_cache(UMT5Config.small(), **sizes)


def test_what_a_configuration_refuses() -> None:
    with pytest.raises(ConfigurationError, match="num_heads"):
        UMT5Config(num_heads=0)


@pytest.mark.parametrize(
    ("config", "millions"),
    [(UMT5Config.small(), 306.6), (UMT5Config.base(), 592.0), (UMT5Config.xl(), 3768.4), (UMT5Config.xxl(), 12972.5)],
)
def test_published_shapes(config: UMT5Config, millions: float) -> None:
    with torch.device("meta"):
        model = UMT5Model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_umt5_is_t5_with_more_biases() -> None:
    shape = {"vocab_size": 8, "d_model": 8, "num_heads": 2, "d_ff": 8, "num_layers": 2}
    config = umt5_config(**shape, head_dim=4)
    assert config == UMT5Config(**shape, head_dim=4).encoder_decoder()
    assert config.relative_per_layer
    assert config.stop_tokens == (1,)
