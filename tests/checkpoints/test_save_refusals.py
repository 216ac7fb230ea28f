"""Models whose modules no options describe, wrappers and invalid paths: not saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer
from transformer.attention import to_gqa
from transformer.checkpoints import load_model, save_model
from transformer.errors import ArgumentError, ConfigurationError


@pytest.fixture
def model() -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(31, 16, 4, 24, 2).eval()


@pytest.mark.parametrize(
    ("wrap", "inside"),
    [
        (partial(torch.compile, backend="eager"), "_orig_mod"),
        (torch.nn.DataParallel, "module"),
        (torch.nn.Sequential, "0"),
    ],
)
def test_a_wrapper_is_named_and_what_to_give_instead(
    wrap: Callable[..., object], inside: str, model: DecoderOnlyTransformer, tmp_path: Path
) -> None:
    wrapped = wrap(model)
    kind = type(wrapped).__name__
    expected = rf"got {kind}, a wrapper of DecoderOnlyTransformer; give the wrapped model, model\.{inside};"
    with pytest.raises(ConfigurationError, match=expected):
        save_model(wrapped, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    save_model(wrapped.get_submodule(inside), tmp_path / "model")


@pytest.mark.parametrize("path", [None, 3, b"model"])
def test_a_path_that_is_none(path: object, model: DecoderOnlyTransformer) -> None:
    with pytest.raises(ArgumentError, match=rf"^path: expected .* got {type(path).__name__}$"):
        save_model(model, path)


def test_a_module_of_ones_own_is_named(model: DecoderOnlyTransformer, tmp_path: Path) -> None:
    model.decoder.blocks[1].attention.out_proj = torch.nn.Identity()
    with pytest.raises(ConfigurationError, match=r"blocks\.1\.attention\.out_proj: expected a plain Linear, got "):
        save_model(model, tmp_path / "model")


def test_a_folder_of_any_name_is_written_through_a_link_and_by_the_umask(
    model: DecoderOnlyTransformer, tmp_path: Path
) -> None:
    far = tmp_path / ("a" * 255)
    far.mkdir()
    (tmp_path / "link").symlink_to(far.name)
    save_model(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([far.name, "link"])
    modes = {each.stat().st_mode & 0o777 for each in far.iterdir()}
    (tmp_path / "other").touch()
    assert modes == {(tmp_path / "other").stat().st_mode & 0o777}
    assert torch.equal(load_model(far).head.proj.weight, model.head.proj.weight)


def encoder_decoder() -> EncoderDecoderTransformer:
    return EncoderDecoderTransformer(11, 13, 8, 2, 12, 2)


def test_an_encoder_decoder_that_was_changed_is_refused_until_its_config_is_true(tmp_path: Path) -> None:
    """Its options are those of its configuration; its modules are compared with them."""
    converted = encoder_decoder()
    converted.encoder = to_gqa(converted.encoder, 1)
    with pytest.raises(ConfigurationError, match=r"k_proj\.weight \[8, 8\], got \[4, 8\]; .* model\.config = "):
        save_model(converted, tmp_path / "model")
    converted.decoder = to_gqa(converted.decoder, 1)
    converted.config = dataclasses.replace(converted.config, attention="mqa")
    save_model(converted, tmp_path / "model")
    assert load_model(tmp_path / "model").config == converted.config

    changed = encoder_decoder()
    changed.decoder.blocks[1].attention.window_size = 3
    message = r"decoder\.blocks\.1\.attention \{'window_size': None, .* got \{'window_size': 3, "
    with pytest.raises(ConfigurationError, match=message):
        save_model(changed, tmp_path / "other")


def quantised(model: DecoderOnlyTransformer) -> DecoderOnlyTransformer:
    quantize_(model, Int8WeightOnlyConfig())
    return model


def fake(_: DecoderOnlyTransformer) -> DecoderOnlyTransformer:
    with FakeTensorMode():
        return DecoderOnlyTransformer(31, 16, 4, 24, 2)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda model: model.to("meta"), r"embedding\.tokens\.weight as Tensor of torch\.float32 on meta"),
        (quantised, r"q_proj\.weight as Int8Tensor of torch\.float32 on cpu"),
        (fake, r"embedding\.tokens\.weight as FakeTensor of torch\.float32"),
        (lambda model: model.to(torch.float8_e4m3fn), r"as Tensor of torch\.float8_e4m3fn on cpu"),
    ],
    ids=["meta", "quantised", "fake", "float8"],
)
def test_tensors_that_no_file_holds_as_they_are(
    change: Callable[[DecoderOnlyTransformer], DecoderOnlyTransformer],
    got: str,
    model: DecoderOnlyTransformer,
    tmp_path: Path,
) -> None:
    changed = change(model)
    with pytest.raises(ConfigurationError, match=f"^model: expected float tensors with data, got .*{got}"):
        save_model(changed, tmp_path / "new" / "model")
    assert not list(tmp_path.iterdir())
