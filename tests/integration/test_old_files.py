"""Files of release 0.1.0: state dicts, conversations and checkpoints load, with the same outputs."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.v0_1_0.write import (
    CHECKPOINTS,
    HERE,
    IDS,
    MODELS,
    MODULES,
    REAL,
    decoder_only,
    learned_positions,
    read,
    vectors,
    windowed_attention,
)
from transformer import KVCache, LayerCache
from transformer.checkpoints import load_model
from transformer.cli.saved import load
from transformer.errors import FileFormatError

EXPECTED = load_file(HERE / "expected.safetensors")


def assert_expected(output: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(output, EXPECTED[name], rtol=1e-5, atol=1e-5)


def assert_as_exact(output: torch.Tensor, build, call: int) -> None:
    """No further from float64 than twice as far as the old release was, whose processor rounded in another order.

    At padding models give 0, where the old release gave numbers that mean nothing.
    """
    exact, before = exact_output(build, call), EXPECTED[f"{build.__name__}.{call}"].double()
    if build is learned_positions and call == 0:
        before = before.masked_fill(~REAL.unsqueeze(-1), 0.0)
    old = (before - exact).abs().max().item()
    assert old < 2e-5, "the old release gave this output"
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5 + 2 * old)


@lru_cache
def exact_output(build, call: int) -> torch.Tensor:
    """The output of a model's first (0) or second (1) call in float64."""
    model = loaded(build).double().enable_cache()
    outputs = [read(model, each) for each in range(call + 1)]
    return outputs[call]


def loaded(build):
    """A module with the weights that 0.1.0 saved."""
    module = build()
    module.load_state_dict(load_file(HERE / f"{build.__name__}.state.safetensors"))
    return module


@pytest.mark.parametrize("build", [*MODULES, *MODELS])
def test_a_state_dict_has_the_same_names_and_gives_the_same_outputs(build):
    module = loaded(build)
    if build in MODELS:
        assert torch.equal(module.generate(IDS, REAL, max_new_tokens=5), EXPECTED[f"{build.__name__}.tokens"])
        module.enable_cache()
    for call in (0, 1):
        if build in MODELS:
            assert_as_exact(read(module, call), build, call)
        else:
            assert_expected(read(module, call), f"{build.__name__}.{call}")


def test_a_pickled_state_dict_of_tied_weights_loads():
    state = torch.load(HERE / "decoder_only.state.pt", weights_only=True)
    assert state["head.proj.weight"].data_ptr() == state["embedding.tokens.weight"].data_ptr()
    model = decoder_only()
    model.load_state_dict(state)
    assert_as_exact(read(model.enable_cache(), 0), decoder_only, 0)


@pytest.mark.parametrize("build", MODULES)
def test_a_layers_conversation_continues(build):
    module = loaded(build)
    module.kv_cache = LayerCache.load(HERE / f"{build.__name__}.kv.safetensors")
    assert_expected(read(module, 1), f"{build.__name__}.1")


@pytest.mark.parametrize("build", MODELS)
def test_a_models_conversation_continues(build):
    model = loaded(build).enable_cache()
    KVCache.load(HERE / f"{build.__name__}.kv.safetensors").install(model)
    assert_as_exact(read(model, 1), build, 1)


@torch.no_grad()
def test_a_continued_window_is_truncated_and_selected():
    """9 tokens of row 0 and 6 of row 1 are in the file; row 0 reads 2 more, takes them back, and reads them again."""
    module = loaded(windowed_attention)
    cache = LayerCache.load(HERE / "windowed_attention.kv.safetensors")
    assert cache.lengths.tolist() == [9, 6]
    assert cache.cached_lengths.tolist() == [6, 6]
    module.kv_cache = cache.select([0])
    chunk = vectors(2, 11, 16)[:1, 9:]
    first = module(chunk)
    module.kv_cache.truncate(9)
    for output in (first, module(chunk)):
        torch.testing.assert_close(output, EXPECTED["windowed_attention.1"][:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", CHECKPOINTS)
def test_a_checkpoint_loads(build):
    model = load_model(HERE / build.__name__)
    assert_expected(read(model, 0)[:, -1], f"{build.__name__}.last")
    tokens = EXPECTED.get(f"{build.__name__}.tokens")
    if tokens is not None:
        assert torch.equal(model.generate(IDS, REAL, max_new_tokens=5), tokens)


def test_a_chat_in_two_files_is_refused_by_a_sentence_and_its_cache_loads():
    with pytest.raises(FileFormatError, match="a release that wrote the transcript into a second file"):
        load(HERE / "chat.kv")
    model = load_model(HERE / "llama").enable_cache()
    assert KVCache.load(HERE / "chat.kv").install(model).length > 0
