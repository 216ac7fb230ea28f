"""Checkpoints of BART, mBART and Marian: saved by transformers, loaded here, and saved again for transformers."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForSequenceClassification,
    BartModel,
    MarianConfig,
    MBartConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from tests.checkpoints.folders import edit_tensors
from tests.checkpoints.theirs import VOCAB, ids
from tests.peers.models import fill, no_float32
from transformer.checkpoints import generation_defaults, load_config, load_model, load_tokenizer, save_model
from transformer.errors import ConfigurationError, FileFormatError
from transformer.models import EncoderDecoderTransformer

SIZES = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 36,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 80,
}
MARIAN = {
    **SIZES,
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": 58,
    "decoder_start_token_id": 58,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
}
TARGETS = 59
"""Tokens of the smallest target vocabulary."""

CASES: dict[str, PreTrainedConfig] = {
    "bart": BartConfig(**SIZES),
    "bart, scaled": BartConfig(**SIZES, scale_embedding=True, activation_function="relu"),
    "bart, bare": BartConfig(**SIZES),
    "mbart": MBartConfig(**SIZES, scale_embedding=True, decoder_start_token_id=7),
    "marian": MarianConfig(**MARIAN),
    "marian, two vocabularies": MarianConfig(
        **MARIAN, share_encoder_decoder_embeddings=False, decoder_vocab_size=TARGETS
    ),
}


class Pair(NamedTuple):
    theirs: PreTrainedModel
    folder: Path

    def logits(self, model: nn.Module | None = None, mask: Tensor | None = None) -> Tensor:
        """Theirs, of a target over a source."""
        given = {"input_ids": ids(3, 11), "decoder_input_ids": target(), "attention_mask": mask}
        return (model or self.theirs)(**given, use_cache=False).logits


def target() -> Tensor:
    return ids(3, 9, seed=2) % TARGETS


def filled(theirs: PreTrainedModel) -> PreTrainedModel:
    """With numbers in every tensor, the bias of the logits too, but for sinusoids."""
    fill(theirs)
    for name, buffer in theirs.named_buffers():
        if name == "final_logits_bias":
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(5)))
    if theirs.config.model_type == "marian":
        for side in (theirs.model.encoder, theirs.model.decoder):
            side.embed_positions.weight.data.copy_(side.embed_positions.create_weight())
    return theirs.eval()


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("theirs")
    if request.param.endswith("bare"):
        filled(BartModel(deepcopy(CASES[request.param]))).save_pretrained(folder)
        return Pair(AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), folder)
    theirs = filled(AutoModelForSeq2SeqLM.from_config(deepcopy(CASES[request.param]), dtype=torch.float32))
    theirs.save_pretrained(folder)
    return Pair(theirs, folder)


PADDED = torch.tensor([[1] * 11, [1] * 6 + [0] * 5, [1] * 2 + [0] * 9])


@torch.no_grad()
def test_logits(pair: Pair) -> None:
    """In float64, theirs with float64 inside, but for the sinusoids of Marian, which are rounded to float32."""
    ours, theirs = load_model(pair.folder, torch.float64), deepcopy(pair.theirs).double()
    assert type(ours) is EncoderDecoderTransformer
    close = 1e-6 if theirs.config.model_type == "marian" else 1e-9
    for mask in (None, PADDED):
        with no_float32():
            expected = pair.logits(theirs, mask)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(ids(3, 11), target(), mask), expected, rtol=0, atol=close)


@pytest.mark.slow
@torch.no_grad()
def test_tokens(pair: Pair) -> None:
    """Greedy and in beams, of padded sources, with caches and without."""
    ours, source = load_model(pair.folder), ids(3, 11)
    for options in ({}, {"num_beams": 4, "early_stopping": False}):
        # Models of random weights repeat themselves; without the repetition each token is another choice.
        given = {"max_new_tokens": 64, "no_repeat_ngram_size": 2, **options}
        theirs = pair.theirs.generate(source, attention_mask=PADDED, do_sample=False, forced_eos_token_id=None, **given)
        for use_cache in (True, False):
            found = ours.generate(source, PADDED, use_cache=use_cache, **given)
            assert found.tolist() == theirs[:, 1:].tolist()


@torch.no_grad()
def test_written_back(pair: Pair, tmp_path: Path) -> None:
    """Read by transformers it gives the very logits of the first model, and read by us the very same weights."""
    first = load_model(pair.folder)
    save_model(first, tmp_path / "ours")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert type(theirs) is type(pair.theirs)
    assert torch.equal(pair.logits(theirs), pair.logits())
    assert theirs.generation_config.decoder_start_token_id == pair.theirs.config.decoder_start_token_id
    ours = load_model(tmp_path / "ours")
    assert ours.config == first.config
    assert torch.equal(ours(ids(3, 11), target()), first(ids(3, 11), target()))


# config.json of facebook/bart-large-cnn and Helsinki-NLP/opus-mt-en-de as they were first published, shrunk, and the
# generation_config.json of the latter.
CNN = {
    **SIZES,
    "model_type": "bart",
    "architectures": ["BartForConditionalGeneration"],
    "activation_function": "gelu",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
    "early_stopping": True,
    "eos_token_id": 2,
    "force_bos_token_to_be_generated": True,
    "is_encoder_decoder": True,
    "length_penalty": 2.0,
    "max_length": 20,
    "min_length": 12,
    "no_repeat_ngram_size": 3,
    "normalize_before": False,
    "num_beams": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "scale_embedding": False,
}
OPUS = {
    **MARIAN,
    "model_type": "marian",
    "architectures": ["MarianMTModel"],
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "bad_words_ids": [[58]],
    "bos_token_id": 0,
    "decoder_vocab_size": VOCAB,
    "extra_pos_embeddings": 59,
    "is_encoder_decoder": True,
    "max_length": 20,
    "normalize_before": False,
    "normalize_embedding": False,
    "num_beams": 4,
    "num_hidden_layers": 2,
    "static_position_embeddings": True,
}
OPUS_GENERATION = {
    "bad_words_ids": [[58]],
    "bos_token_id": 0,
    "decoder_start_token_id": 58,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "max_length": 20,
    "num_beams": 4,
    "pad_token_id": 58,
    "renormalize_logits": True,
}
PUBLISHED: dict[str, tuple[dict[str, object], dict[str, object] | None]] = {
    "summaries": (CNN, None),
    "translations": (OPUS, OPUS_GENERATION),
    "first translations": (OPUS, None),
}


def published(folder: Path, config: dict[str, object], generation: dict[str, object] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def options_of(name: str) -> dict[str, object]:
    """What the files recommend, beside the number of beams and the maximum length."""
    if name == "summaries":
        firsts = {"forced_bos_token_id": 0, "stop_tokens": (2,), "pad_token": 1}
        return firsts | {
            "early_stopping": True,
            "length_penalty": 2.0,
            "min_new_tokens": 11,
            "no_repeat_ngram_size": 3,
        }
    firsts = {"forced_eos_token_id": (0,), "stop_tokens": (0,), "pad_token": 58, "bad_words_ids": [[58]]}
    more = {"renormalize_logits": True} if name == "translations" else {}
    return firsts | more | {"early_stopping": False}


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_files_and_what_they_recommend(name: str, tmp_path: Path) -> None:
    config, generation = PUBLISHED[name]
    kind = deepcopy(CASES[str(config["model_type"])])
    filled(AutoModelForSeq2SeqLM.from_config(kind, dtype=torch.float32)).save_pretrained(tmp_path)
    published(tmp_path, config, generation)
    if name == "first translations":
        edit_tensors(tmp_path, add_sinusoids)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    recommended = generation_defaults(tmp_path)
    assert recommended == {"num_beams": 4, "max_length": 20, "temperature": 0.0} | options_of(name)
    scored = {"return_dict_in_generate": True, "output_scores": True}
    expected = theirs.generate(ids(3, 11), attention_mask=PADDED, **scored)
    found = load_model(tmp_path).generate(ids(3, 11), PADDED, **recommended, return_scores=True)
    assert found.tokens.tolist() == expected.sequences[:, 1:].tolist()
    torch.testing.assert_close(found.beam_scores, expected.sequences_scores)


def add_sinusoids(tensors: dict[str, Tensor]) -> None:
    """Of Marian, as the first files have them."""
    sinusoids = MarianSinusoidalPositionalEmbedding(80, 24)
    for side in ("encoder", "decoder"):
        tensors[f"model.{side}.embed_positions.weight"] = sinusoids.create_weight()


def without(config: dict[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in keys}


FOUR = ("bos", "eos", "pad", "decoder_start")
TAKEN = [
    without(
        CNN, "activation_function", "scale_embedding", "is_encoder_decoder", *(f"{each}_token_id" for each in FOUR)
    ),
    CNN | {"hidden_size": 24, "num_attention_heads": 4, "scale_embedding": None, "dropout": 0.5, "no_such_key": [1]},
    without(OPUS, "decoder_vocab_size", "max_position_embeddings", "static_position_embeddings"),
    OPUS | {"decoder_vocab_size": None, "tie_word_embeddings": True, "encoder_layerdrop": 0.5},
]


@pytest.mark.parametrize("config", TAKEN)
@torch.no_grad()
def test_what_transformers_takes(config: dict[str, object], tmp_path: Path) -> None:
    kind = deepcopy(CASES[str(config["model_type"])])
    filled(AutoModelForSeq2SeqLM.from_config(kind, dtype=torch.float32)).save_pretrained(tmp_path)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(published(tmp_path, config)).eval()
    ours, expected = load_model(tmp_path), Pair(theirs, tmp_path).logits()
    torch.testing.assert_close(ours(ids(3, 11), target()), expected, rtol=0, atol=1e-4)
    tokens = theirs.config.decoder_start_token_id, (theirs.config.eos_token_id,), theirs.config.pad_token_id
    assert (ours.config.start_token, ours.config.stop_tokens, ours.config.pad_token) == tokens


REFUSED = [
    (CNN, {"normalize_before": True}),
    (CNN, {"add_final_layer_norm": True}),
    (CNN, {"normalize_embedding": False}),
    (CNN, {"static_position_embeddings": True}),
    (CNN, {"decoder_attention_heads": 2}),
    (CNN, {"decoder_ffn_dim": 48}),
    (CNN, {"num_hidden_layers": 3}),
    (CNN, {"tie_word_embeddings": False}),
    (CNN, {"is_encoder_decoder": False}),
    (CNN, {"is_decoder": True}),
    (CNN, {"is_causal": True}),
    (CNN, {"activation_function": "tanh"}),
    (CNN, {"decoder_start_token_id": VOCAB}),
    (OPUS, {"decoder_vocab_size": TARGETS}),
    (OPUS, {"static_position_embeddings": False}),
    (OPUS, {"normalize_embedding": True}),
    (OPUS | {"model_type": "mbart"}, {"normalize_before": False}),
]


@pytest.mark.parametrize(("config", "wrong"), REFUSED)
def test_what_is_refused(config: dict[str, object], wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"config\.json, {next(iter(wrong))}"):
        load_config(published(tmp_path, config | wrong))


def test_models_of_sentencepiece_are_refused(tmp_path: Path) -> None:
    (tmp_path / "source.spm").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"transformers\.MarianTokenizer; .*source\.spm"):
        load_tokenizer(published(tmp_path, OPUS))


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    classifier = BartForSequenceClassification(deepcopy(CASES["bart"]))
    classifier.save_pretrained(tmp_path)
    with pytest.raises(FileFormatError, match="BartForSequenceClassification, which is not supported"):
        load_model(tmp_path)
