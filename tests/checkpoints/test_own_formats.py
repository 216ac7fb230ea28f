"""Models that no published family describes: saved with all options, loaded with the very same outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.checkpoints.compositions import FOR_ENGINES, LAYERED, NATIVE, SIZES, config_of
from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer
from transformer.attention import to_gqa, to_mha
from transformer.blocks import BlockStack
from transformer.checkpoints import empty_model, generation_defaults, load_config, load_model, save_model
from transformer.models import (
    Composition,
    EncoderTransformer,
    LanguageHead,
    TokenEmbedding,
    UMT5Config,
    UMT5Model,
    composed,
    composition_of,
)

IDS = torch.randint(31, (2, 11), generator=torch.Generator().manual_seed(1))

ALIBI_IN_ONE_LAYER = replace(
    LAYERED["scalings"],
    layers=(
        LAYERED["scalings"]
        .layers[0]
        ._replace(options=replace(LAYERED["scalings"].layers[0].options, position="alibi", num_heads=2)),
        *LAYERED["scalings"].layers[1:],
    ),
)


def filled(model: nn.Module) -> nn.Module:
    """The model with values in all tensors, so that a norm or bias that is lost shows."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if isinstance(model, EncoderDecoderTransformer | UMT5Model):
            return model(IDS % 11, IDS[:, :7] % 11)
        return model(IDS)


def saved_and_loaded(model: nn.Module, folder: Path, expected: str, **options: object) -> nn.Module:
    """What `load_model` gives of a saved model: equal outputs, and saved again equal files."""
    save_model(model, folder, **options)
    assert model_type(folder) == expected
    loaded = load_model(folder)
    assert type(loaded) is type(model)
    assert torch.equal(output(loaded), output(model))
    again = folder.with_name("again")
    save_model(loaded, again, **options)
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }
    return loaded


@pytest.mark.parametrize("name", FOR_ENGINES | NATIVE)
def test_a_model_by_options(name: str, tmp_path: Path) -> None:
    options = (FOR_ENGINES | NATIVE)[name]
    expected = "modular_attention_native" if name in NATIVE else "modular_attention"
    loaded = saved_and_loaded(filled(DecoderOnlyTransformer(**SIZES, **options)), tmp_path / "model", expected)
    assert loaded.config == load_config(tmp_path / "model") == config_of(options)


@pytest.mark.parametrize("name", LAYERED)
def test_layers_that_differ(name: str, tmp_path: Path) -> None:
    model = filled(composed(LAYERED[name]))
    loaded = saved_and_loaded(model, tmp_path / "model", "modular_attention")
    assert composition_of(loaded) == load_config(tmp_path / "model") == LAYERED[name]
    assert loaded.config == model.config


def test_layers_that_differ_and_that_engines_cannot_run(tmp_path: Path) -> None:
    model = filled(composed(ALIBI_IN_ONE_LAYER))
    loaded = saved_and_loaded(model, tmp_path / "model", "modular_attention_native")
    assert composition_of(loaded) == load_config(tmp_path / "model") == ALIBI_IN_ONE_LAYER


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_modules_of_pytorch_as_embedding_and_head(tied: bool, native: bool, tmp_path: Path) -> None:
    stack = DecoderOnlyTransformer(**SIZES, position="alibi" if native else "none", norm_unit_offset=True).decoder
    embedding, head = nn.Embedding(31, 16), nn.Linear(16, 31, bias=not tied)
    if tied:
        head.weight = embedding.weight
    model = filled(DecoderOnlyTransformer.from_parts(embedding, stack, head))
    model.config = replace(model.config, stop_tokens=(3, 4), start_token=5, pad_token=0)
    expected = "modular_attention_native" if native else "modular_attention"
    loaded = saved_and_loaded(model, tmp_path / "model", expected)
    assert (loaded.config.stop_tokens, loaded.config.start_token, loaded.config.pad_token) == ((3, 4), 5, 0)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(list(model.parameters()))


def test_a_composition_that_is_a_known_family_is_saved_as_that_family(tmp_path: Path) -> None:
    """Windows or key/value heads that were changed after the model was built count."""
    parts = DecoderOnlyTransformer(**SIZES)
    by_parts = DecoderOnlyTransformer.from_parts(
        TokenEmbedding(31, 16), BlockStack(parts.decoder.blocks, parts.decoder.norm), LanguageHead(16, 31)
    )
    saved_and_loaded(filled(by_parts), tmp_path / "parts" / "model", "llama")

    converted = to_gqa(filled(DecoderOnlyTransformer(**SIZES)), 2)
    loaded = saved_and_loaded(converted, tmp_path / "converted" / "model", "llama")
    assert loaded.config.num_groups == 2

    for block in converted.decoder.blocks:
        block.attention.window_size = 4
    loaded = saved_and_loaded(converted, tmp_path / "sliding" / "model", "mistral")
    assert loaded.config.window_size == 4


def test_a_window_of_one_layer_is_saved(tmp_path: Path) -> None:
    model = filled(DecoderOnlyTransformer(**SIZES))
    before = output(model)
    model.decoder.blocks[1].attention.window_size = 2
    assert not torch.equal(output(model), before)
    loaded = saved_and_loaded(model, tmp_path / "model", "smollm3")
    assert [block.attention.window_size for block in loaded.decoder.blocks] == [None, 2, None]
    model.decoder.blocks[2].attention.window_size = 5
    loaded = saved_and_loaded(model, tmp_path / "two" / "model", "modular_attention")
    assert [block.attention.window_size for block in loaded.decoder.blocks] == [None, 2, 5]


def test_one_layer_with_fewer_groups_is_saved(tmp_path: Path) -> None:
    model = filled(DecoderOnlyTransformer(**SIZES))
    fewer = to_gqa(deepcopy(model), 2)
    model.decoder.blocks[2].attention = fewer.decoder.blocks[2].attention
    loaded = saved_and_loaded(model, tmp_path / "model", "modular_attention")
    assert [block.attention.num_groups for block in loaded.decoder.blocks] == [4, 4, 2]


_UMT5 = UMT5Config(vocab_size=11, d_model=8, num_heads=2, head_dim=4, d_ff=12, num_layers=1).encoder_decoder()

OTHERS = {
    "encoder-decoder": EncoderDecoderTransformer(11, 13, 8, 2, 12, 2, num_decoder_layers=1, window_size=3, num_sinks=1),
    "shared": EncoderDecoderTransformer(11, 11, 8, 2, 12, 2, shared_embeddings=True, position="relative"),
    "encoder": EncoderTransformer(31, 8, 2, 12, 2, position="alibi", num_token_types=2, embedding_norm=True),
    "encoder, rotary": EncoderTransformer(31, 8, 2, 12, 2, dropout=0.1, attention="mqa", stop_tokens=(2,)),
    "UMT5, scaled": UMT5Model(replace(_UMT5, scale=0.5)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_encoders_and_encoder_decoders(name: str, tmp_path: Path) -> None:
    model = filled(OTHERS[name])
    loaded = saved_and_loaded(model, tmp_path / "model", "modular_attention_native")
    assert loaded.config == load_config(tmp_path / "model") == model.config


@pytest.mark.parametrize(
    ("make", "heads", "expected"),
    [
        (lambda: UMT5Model(_UMT5), 1, ("mqa", None)),
        (lambda: EncoderTransformer(31, 8, 4, 12, 2), 2, ("gqa", 2)),
        (lambda: EncoderDecoderTransformer(11, 13, 8, 4, 12, 2, attention="gqa", num_groups=2), 4, ("mha", None)),
    ],
)
def test_encoders_and_encoder_decoders_with_other_key_value_heads(
    make: Callable[[], nn.Module], heads: int, expected: tuple[str, int | None], tmp_path: Path
) -> None:
    converted = (to_mha(filled(make())) if heads == 4 else to_gqa(filled(make()), heads)).eval()
    config = saved_and_loaded(converted, tmp_path / "model", "modular_attention_native").config
    assert (config.attention, config.num_groups) == expected


def test_dropout_is_saved_in_our_own_formats_only(tmp_path: Path) -> None:
    kinds = (("llama", {}, 0.0), ("own", {"norm_unit_offset": True}, 0.1), ("native", NATIVE["alibi"], 0.1))
    for name, options, kept in kinds:
        save_model(DecoderOnlyTransformer(**SIZES, dropout=0.1, **options), tmp_path / name)
        assert load_config(tmp_path / name).dropout == kept
        block = load_model(tmp_path / name).train().decoder.blocks[0]
        assert block.attention.dropout == block.attention_residual.dropout == kept


def test_dropout_that_differs_inside_of_a_layer_leaves_a_published_family_as_it_is(tmp_path: Path) -> None:
    model = filled(DecoderOnlyTransformer(**SIZES))
    model.decoder.blocks[1].attention.dropout = 0.3
    saved_and_loaded(model, tmp_path / "model", "llama")

    model.decoder.blocks[0].attention.window_size = 2
    model.decoder.blocks[2].attention.window_size = 3
    loaded = saved_and_loaded(model, tmp_path / "own" / "model", "modular_attention")
    assert [block.attention.dropout for block in loaded.decoder.blocks] == [0.0, 0.3, 0.0]
    assert [block.attention_residual.dropout for block in loaded.decoder.blocks] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("options", [{"norm_unit_offset": True}, {"position": "relative"}])
def test_each_tensor_keeps_its_dtype(options: dict, tmp_path: Path) -> None:
    model = filled(DecoderOnlyTransformer(**SIZES, **options)).bfloat16()
    model.decoder.norm.float()
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert {name: each.dtype for name, each in loaded.named_parameters()} == {
        name: each.dtype for name, each in model.named_parameters()
    }
    assert {each.dtype for each in load_model(tmp_path / "model", torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("composition", [*LAYERED.values(), ALIBI_IN_ONE_LAYER])
def test_shards_and_an_empty_model(composition: Composition, tmp_path: Path) -> None:
    model = filled(composed(composition))
    expected = "modular_attention_native" if composition is ALIBI_IN_ONE_LAYER else "modular_attention"
    saved_and_loaded(model, tmp_path / "model", expected, shard_bytes=4000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    empty = empty_model(tmp_path / "model")
    assert {name: each.shape for name, each in empty.named_parameters()} == {
        name: each.shape for name, each in model.named_parameters()
    }
    assert {each.device.type for each in empty.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["alibi", "encoder", "encoder-decoder"])
def test_the_auto_classes_refuse_the_native_format_by_name(name: str, tmp_path: Path) -> None:
    save_model(OTHERS[name] if name in OTHERS else DecoderOnlyTransformer(**SIZES, **NATIVE[name]), tmp_path / "model")
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="modular_attention_native"):
            auto.from_pretrained(tmp_path / "model")


def test_tokens_are_where_generation_looks_for_them(tmp_path: Path) -> None:
    options = {"stop_tokens": (3,), "pad_token": 0, "start_token": 7}
    save_model(DecoderOnlyTransformer(**SIZES, **NATIVE["alibi"], **options), tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    assert json.loads(file.read_text()) == {"bos_token_id": 7, "eos_token_id": 3, "pad_token_id": 0}
    assert generation_defaults(tmp_path / "model")["stop_tokens"] == (3,)
    file.write_text('{"bos_token_id": 8, "eos_token_id": [4, 5], "pad_token_id": 1}')
    config = load_config(tmp_path / "model")
    assert (config.start_token, config.stop_tokens, config.pad_token) == (8, (4, 5), 1)
