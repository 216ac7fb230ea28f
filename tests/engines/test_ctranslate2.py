"""Saved models of known families in CTranslate2: equal tokens and vectors, what its converter ignores, and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import pytest
import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from transformer import DecoderOnlyTransformer
from transformer.checkpoints import save_model
from transformer.models import (
    EncoderDecoderTransformer,
    EncoderTransformer,
    UMT5Config,
    UMT5Model,
    t5_config,
    t5_v1_1_config,
)
from transformer.positions import Llama3Scaling, YaRNScaling

VOCAB, NEW = 61, 24
TOKENS = ["<pad>", "</s>", "<s>", "<unk>", *(f"w{index}" for index in range(4, VOCAB))]
SHAPE = (VOCAB, 24, 4, 36, 3)
ON_CPU = {"device": "cpu", "compute_type": "float32", "inter_threads": 1, "intra_threads": 1}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def fill(model: nn.Module, token_scale: float = 1.5) -> Any:
    """Random weights, norms and biases included; tables of tokens are scaled so that greedy tokens vary."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 2:
                scale = token_scale if parameter.shape[0] == VOCAB else 1.5
                parameter.copy_(scale * parameter.shape[1] ** -0.5 * drawn)
            else:
                is_scale = name.endswith("weight") and not getattr(model.config, "norm_unit_offset", False)
                parameter.copy_(is_scale + 0.2 * drawn)
    return model.eval()


def converted(model: nn.Module, folder: Path) -> str:
    """The folder of CTranslate2's model, converted from what `save_model` wrote and a tokenizer of whole words."""
    save_model(model, folder / "saved")
    words = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "saved")
    return TransformersConverter(str(folder / "saved")).convert(str(folder / "converted"), quantization="float32")


def prompts(*lengths: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(4, VOCAB, (length,), generator=random).tolist() for length in lengths]


def named(ids: list[int]) -> list[str]:
    return [TOKENS[index] for index in ids]


def until_stop(ids: Tensor) -> list[str]:
    tokens = named(ids.tolist())
    return tokens[: tokens.index("</s>")] if "</s>" in tokens else tokens


def check_varied(tokens: list[list[str]]) -> None:
    assert len({token for row in tokens for token in row}) >= 10


def logits(folder: str, ids: list[list[int]]) -> Tensor:
    return torch.from_numpy(np.array(ctranslate2.Generator(folder, **ON_CPU).forward_batch(ids)).copy())


def decoder(**options: object) -> DecoderOnlyTransformer:
    options = {"attention": "gqa", "num_groups": 2, "tied_embeddings": False, "stop_tokens": (1,)} | options
    # A tied head repeats the last token where the table outweighs the blocks.
    return fill(DecoderOnlyTransformer(*SHAPE, start_token=2, **options), 0.3 if options["tied_embeddings"] else 1.5)


YARN = YaRNScaling(4.0, original_length=32)
QWEN3 = {"qk_norm": True, "head_dim": 10, "rotary_base": 500.0}
GEMMA2 = {
    "tied_embeddings": True,
    "norm_unit_offset": True,
    "norm_placement": "both",
    "activation": "gelu_tanh",
    "embedding_scale": 24**0.5,
    "head_dim": 10,
    "layer_pattern": "sliding full",
    "window_size": 64,
}


@pytest.mark.parametrize(
    "options",
    [
        {"rotary_base": 500.0},
        {"attention": "mqa", "num_groups": None, "attention_bias": True, "feed_forward_bias": True},
        QWEN3,
        GEMMA2,
    ],
    ids=["llama", "llama, multi-query, biases", "qwen3", "gemma2"],
)
def test_a_decoder_gives_equal_tokens(tmp_path: Path, options: dict) -> None:
    model = decoder(**options)
    folder = converted(model, tmp_path)
    given = prompts(5, 12, 20)
    generator = ctranslate2.Generator(folder, **ON_CPU)
    results = generator.generate_batch(
        [named(ids) for ids in given], max_length=NEW, include_prompt_in_result=False, return_end_token=False
    )
    theirs = [result.sequences[0] for result in results]
    ours = [until_stop(model.generate(torch.tensor([ids]), max_new_tokens=NEW)[0, len(ids) :]) for ids in given]
    assert theirs == ours
    check_varied(ours)
    with torch.no_grad():
        torch.testing.assert_close(logits(folder, given[-1:]), model(torch.tensor(given[-1:])), rtol=0, atol=1e-4)


SMALL = {"head_dim": 7, "relative_buckets": 8, "relative_max_distance": 20}


def umt5() -> UMT5Model:
    return UMT5Model(UMT5Config(vocab_size=VOCAB, d_model=24, num_heads=4, d_ff=36, num_layers=2, **SMALL))


@pytest.mark.parametrize(
    "build",
    [
        lambda: EncoderDecoderTransformer.from_config(t5_config(*SHAPE, **SMALL)),
        lambda: EncoderDecoderTransformer.from_config(t5_v1_1_config(*SHAPE, **SMALL)),
        umt5,
    ],
    ids=["t5", "t5 1.1", "umt5"],
)
def test_an_encoder_decoder_gives_equal_tokens(tmp_path: Path, build: Any) -> None:
    model = fill(build(), token_scale=0.3)
    sources = prompts(6, 9, 15, 24)
    ours = [until_stop(model.generate(torch.tensor([ids]), max_new_tokens=NEW)[0]) for ids in sources]
    translator = ctranslate2.Translator(converted(model, tmp_path), **ON_CPU)
    results = translator.translate_batch([named(ids) for ids in sources], beam_size=1, max_decoding_length=NEW)
    assert [result.hypotheses[0] for result in results] == ours
    check_varied(ours)


def test_bert_gives_equal_vectors(tmp_path: Path) -> None:
    """All but the pooled vector: `save_model` writes no pooler, since an encoder here has none."""
    options = {"position": "learned", "max_length": 32, "num_token_types": 2, "activation": "gelu", "norm_eps": 1e-12}
    options |= {"norm": "layer", "norm_placement": "after", "embedding_norm": True, "attention_bias": True}
    model = fill(EncoderTransformer(*SHAPE, feed_forward="plain", feed_forward_bias=True, **options))
    given = prompts(5, 9)
    encoder = ctranslate2.Encoder(converted(model, tmp_path), **ON_CPU)
    vectors = torch.from_numpy(np.array(encoder.forward_batch(given).last_hidden_state).copy())
    assert vectors.std() > 0.5
    for row, ids in zip(vectors, given, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(row[: len(ids)], model(torch.tensor([ids]))[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({}, {"activation": "gelu"}),
        (QWEN3, {"activation": "gelu"}),
        (QWEN3, {"window_size": 4, "layer_pattern": "sliding full"}),
        (GEMMA2, {"activation": "silu"}),
        (GEMMA2, {"softcap": 1.0}),
        (GEMMA2, {"logit_softcap": 0.5}),
        (GEMMA2, {"scale": 0.5}),
        (GEMMA2, {"window_size": 4}),
        (GEMMA2, {"rotary_base": 77.0}),
    ],
    ids=lambda options: ", ".join(map(str, options)) if len(options) < 3 else None,
)
def test_options_that_the_converter_ignores(tmp_path: Path, options: dict, lost: dict) -> None:
    """Without a word: its model computes what ours computes without the option."""
    given, without = decoder(**options | lost), decoder(**options)
    without.load_state_dict(given.state_dict())
    ids = prompts(20)
    theirs = logits(converted(given, tmp_path), ids)
    with torch.no_grad():
        torch.testing.assert_close(theirs, without(torch.tensor(ids)), rtol=0, atol=1e-4)
        assert (theirs - given(torch.tensor(ids))).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rotary_scaling": YARN}, "RoPE scaling type 'yarn' is not yet implemented"),
        (QWEN3 | {"rotary_scaling": YARN}, "RoPE scaling type 'yarn' is not yet implemented"),
        (QWEN3 | {"rotary_scaling": Llama3Scaling(8.0, 1.0, 4.0, 16)}, "rotary_low_freq_factor"),
        # By its model_type, or by the class that importing `transformer.engines` registers for it.
        ({"qk_norm": True, "norm_placement": "both"}, "modular_attention|ModularConfig"),
    ],
    ids=["llama, yarn", "qwen3, yarn", "qwen3, llama3", "no family"],
)
def test_what_the_converter_refuses(tmp_path: Path, options: dict, reason: str) -> None:
    with pytest.raises((NotImplementedError, ValueError), match=reason):
        converted(decoder(**options), tmp_path)


def test_heads_of_another_width_fail_in_a_llama(tmp_path: Path) -> None:
    """The converter takes a head to be `d_model / num_heads` wide; Qwen3 and Gemma 2 say their own."""
    model = decoder(head_dim=8)
    folder = converted(model, tmp_path)
    with pytest.raises(ValueError, match="has dimension 64 but expected 48"):
        logits(folder, prompts(5))
