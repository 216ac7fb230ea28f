"""Checkpoints of T5, mT5 and UMT5: saved by transformers, loaded here, and saved again for transformers."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, MT5Config, PreTrainedConfig, PreTrainedModel, T5Config, UMT5Config

from tests.checkpoints.folders import edit_tensors
from tests.checkpoints.theirs import VOCAB, ids
from tests.peers.models import fill, no_float32
from transformer.checkpoints import load_config, load_model, save_model
from transformer.errors import ConfigurationError, FileFormatError
from transformer.models import EncoderDecoderTransformer, UMT5Model

SIZES = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": 7,
    "d_ff": 36,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
GATED = {"feed_forward_proj": "gated-gelu"}
CASES: dict[str, tuple[PreTrainedConfig, bool]] = {
    "t5": (T5Config(**SIZES), True),
    "t5, gelu": (T5Config(**SIZES, feed_forward_proj="gelu"), True),
    "t5 1.1": (T5Config(**SIZES, **GATED, tie_word_embeddings=False), False),
    "t5 1.1, one table": (T5Config(**SIZES, feed_forward_proj="gated-silu", tie_word_embeddings=False), True),
    "mt5": (MT5Config(**SIZES, **GATED), False),
    "umt5": (UMT5Config(**SIZES, **GATED, tie_word_embeddings=False), False),
    "umt5, one table": (UMT5Config(**SIZES, **GATED), True),
}


class Pair(NamedTuple):
    ours: EncoderDecoderTransformer | UMT5Model
    theirs: PreTrainedModel
    folder: Path

    def logits(self, model: nn.Module | None = None, mask: Tensor | None = None) -> Tensor:
        """Theirs, of a target over a source."""
        given = {"input_ids": ids(3, 11), "decoder_input_ids": ids(3, 9, seed=2), "attention_mask": mask}
        return (model or self.theirs)(**given, use_cache=False).logits


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config, tied = CASES[request.param]
    theirs = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
    if not tied:
        # They tie the two whatever is asked for; checkpoints with different ones they load, and write, as those are.
        theirs.lm_head.weight = nn.Parameter(torch.empty_like(theirs.lm_head.weight))
        theirs.all_tied_weights_keys = {
            key: value for key, value in theirs.all_tied_weights_keys.items() if key != "lm_head.weight"
        }
    fill(theirs)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return Pair(load_model(folder), theirs, folder)


@torch.no_grad()
def test_logits(pair: Pair) -> None:
    """In float64, theirs with float64 inside: scores that nothing scales are large, and float32 rounds them."""
    ours, theirs = load_model(pair.folder, torch.float64), deepcopy(pair.theirs).double()
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5, [0] * 3 + [1] * 8])
    for given in (None, mask):
        with no_float32():
            expected = pair.logits(theirs, given)
        assert expected.std() > 0.05
        torch.testing.assert_close(ours(ids(3, 11), ids(3, 9, seed=2), given), expected, rtol=0, atol=1e-9)


@pytest.mark.slow
@torch.no_grad()
def test_greedy_tokens(pair: Pair) -> None:
    # Models of random weights repeat themselves; without the repetition each token is another choice.
    source, options = ids(2, 11), {"max_new_tokens": 32, "no_repeat_ngram_size": 2}
    theirs = pair.theirs.generate(source, do_sample=False, use_cache=False, **options)
    assert pair.ours.generate(source, **options).tolist() == theirs[:, 1:].tolist()


@pytest.mark.slow
@torch.no_grad()
def test_tokens_after_a_prompt_of_the_decoder(pair: Pair) -> None:
    """With the start token in front, which both add where it is missing; greedy and in beams."""
    source, target = ids(2, 11), ids(2, 4, seed=5).clamp(min=2)
    names = ("decoder_input_ids",) if type(pair.ours) is UMT5Model else ("target_ids",)
    for options in ({}, {"num_beams": 3, "early_stopping": "never"}):
        given = {"max_new_tokens": 16, **options}
        theirs = pair.theirs.generate(source, decoder_input_ids=target, do_sample=False, use_cache=False, **given)
        assert pair.ours.generate(source, **{names[0]: target}, **given).tolist() == theirs[:, 1:].tolist()


@torch.no_grad()
def test_written_back(pair: Pair, tmp_path: Path) -> None:
    """Read by transformers it gives the very logits of the first model, and read by us the very same weights."""
    save_model(pair.ours, tmp_path / "ours")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(pair.logits(theirs), pair.logits())
    assert theirs.generation_config.decoder_start_token_id == 0
    ours = load_model(tmp_path / "ours")
    assert type(ours) is type(pair.ours)
    assert torch.equal(ours(ids(3, 11), ids(3, 9, seed=2)), pair.ours(ids(3, 11), ids(3, 9, seed=2)))


def test_its_kind_of_model(pair: Pair) -> None:
    kind = UMT5Model if pair.theirs.config.model_type == "umt5" else EncoderDecoderTransformer
    assert type(pair.ours) is kind
    tied = pair.theirs.lm_head.weight is pair.theirs.shared.weight
    assert pair.ours.config.tied_embeddings == tied


def published(folder: Path, **keys: object) -> Path:
    """config.json as published with the weights, from versions without `scale_decoder_outputs`."""
    (folder / "config.json").write_text(json.dumps({**SIZES, "is_encoder_decoder": True, **keys}), "utf-8")
    return folder


def test_published_configurations(tmp_path: Path) -> None:
    t5 = load_config(published(tmp_path, model_type="t5"))
    assert (t5.activation, t5.feed_forward, t5.tied_embeddings, t5.logit_scale) == ("relu", "plain", True, 24**-0.5)
    own = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    for model_type in ("t5", "mt5", "umt5"):
        config = load_config(published(tmp_path, model_type=model_type, **own))
        assert (config.activation, config.feed_forward) == ("gelu_tanh", "gated")
        assert (config.tied_embeddings, config.logit_scale) == (False, 1.0)
        assert config.relative_per_layer == (model_type == "umt5")
        assert (config.stop_tokens, config.pad_token, config.start_token) == ((1,), 0, 0)


SHARED, ENCODER, DECODER = (f"{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"))


def tables(pair: Pair, folder: Path, *names: str, spoil: str = "") -> Path:
    """Their folder, with the table under these names, other numbers under one of them."""
    shutil.copytree(pair.folder, folder)

    def change(tensors: dict[str, Tensor]) -> None:
        table = tensors.pop(SHARED)
        tensors.update({name: table + 1 if name == spoil else table.clone() for name in names})

    edit_tensors(folder, change)
    return folder


@pytest.mark.slow
@torch.no_grad()
def test_a_table_under_any_of_its_names(pair: Pair, tmp_path: Path) -> None:
    """Files of some tools have it once, without `shared` (google/madlad400-3b-mt), those of others three times."""
    given = ids(3, 11), ids(3, 9, seed=2)
    for number, names in enumerate([(DECODER,), (ENCODER,), (ENCODER, DECODER), (SHARED, ENCODER, DECODER)]):
        folder = tables(pair, tmp_path / str(number), *names)
        assert torch.equal(load_model(folder)(*given), pair.ours(*given))


def test_tables_that_differ_are_refused_by_name(pair: Pair, tmp_path: Path) -> None:
    for number, names in enumerate([(SHARED, DECODER), (SHARED, ENCODER), (DECODER, ENCODER)]):
        folder = tables(pair, tmp_path / str(number), *names, spoil=names[1])
        with pytest.raises(FileFormatError) as said:
            load_model(folder)
        reason = "this model shares one embedding between sources and targets"
        both = f"expected {names[0]} and {names[1]} to be the same, as {reason}"
        assert str(said.value) == f"{folder / 'model.safetensors'}: {both}, got different tensors"
    with pytest.raises(FileFormatError, match=r"missing: shared.weight$"):
        load_model(tables(pair, tmp_path / "none"))


@pytest.mark.parametrize(
    ("model_type", "wrong"),
    [("t5", {"feed_forward_proj": "tanh"}), ("umt5", {"feed_forward_proj": "relu"}), ("mt5", {"d_kv": 0})],
)
def test_what_is_refused(model_type: str, wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"config\.json, {next(iter(wrong))}"):
        load_config(published(tmp_path, model_type=model_type, **wrong))
