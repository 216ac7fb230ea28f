"""Families in each dtype, compared with transformers in that dtype, both against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from tests.checkpoints.test_bart import CASES as BART_CASES
from tests.checkpoints.test_bert import CONFIG as BERT
from tests.checkpoints.test_encoders import DISTILBERT, MODERN, ROBERTA
from tests.checkpoints.test_t5 import CASES as T5_CASES
from tests.checkpoints.theirs import CASES, ids
from tests.peers.models import fill, no_float32
from transformer.checkpoints import empty_model, load_model, save_model

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DECODERS = [
    "llama",
    "llama, yarn, mscale",
    "mistral",
    "qwen2, windows",
    "qwen3",
    "gemma, multi-query",
    "gemma2",
    "gpt2",
]
ENCODER_DECODERS = ["t5", "t5 1.1, one table", "mt5", "umt5"]
ENCODERS = {
    "bert": (AutoModel, BERT),
    "roberta": (AutoModel, ROBERTA),
    "distilbert": (AutoModel, DISTILBERT),
    "modernbert": (AutoModel, MODERN),
}
CONFIGS: dict[str, tuple[Any, PreTrainedConfig]] = {
    **{name: (AutoModelForCausalLM, CASES[name]) for name in DECODERS},
    **{name: (AutoModelForSeq2SeqLM, T5_CASES[name][0]) for name in ENCODER_DECODERS},
    **{name: (AutoModelForSeq2SeqLM, BART_CASES[name]) for name in ("bart", "marian")},
    **ENCODERS,
}
LARGE = 5e4
"""What T5's `wo` is multiplied by: its sums then pass the largest float16, as those of published checkpoints do."""


def saved(name: str, dtype: torch.dtype, folder: Path, wo: float = 1.0) -> None:
    """A model in float32, the numbers of which are those of `dtype`: to load it in that dtype rounds nothing."""
    auto, config = CONFIGS[name]
    model = auto.from_config(config, dtype=torch.float32)
    fill(model, 0.0 if config.model_type.startswith("gemma") else 1.0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(parameter.to(dtype) * (wo if "block.1" in path and ".wo." in path else 1.0))
    model.save_pretrained(folder)


def loaded(name: str, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    return CONFIGS[name][0].from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def outputs(name: str, model: nn.Module) -> Tensor:
    """Of theirs or ours, in float64: logits, or states where there are none."""
    theirs = isinstance(model, PreTrainedModel)
    if name in (*ENCODER_DECODERS, *BART_CASES):
        source, target = ids(40, 24), ids(40, 20, seed=2)
        given = {"input_ids": source, "decoder_input_ids": target, "use_cache": False}
        return (model(**given).logits if theirs else model(source, target)).double()
    tokens = ids(48, 14 if name in ENCODERS else 30)
    # RoBERTa's padding token has no position of its own.
    out = model(tokens.where(tokens != 1, 2))
    if theirs:
        out = out.last_hidden_state if name in ENCODERS else out.logits
    return out.double()


def errors(name: str, dtype: torch.dtype, folder: Path) -> tuple[float, float]:
    """The largest of ours and of theirs."""
    exact_model = loaded(name, torch.float64, folder)
    with no_float32():
        exact = outputs(name, exact_model)
    assert exact.std() > 0.05
    models = load_model(folder, dtype), loaded(name, dtype, folder)
    ours, theirs = ((outputs(name, model) - exact).abs().max().item() for model in models)
    return ours, theirs


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_off_by_no_more_than_twice_the_reference(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(name, dtype, tmp_path)
    ours, theirs = errors(name, dtype, tmp_path)
    assert ours <= 2 * theirs


@pytest.mark.parametrize("name", ["t5", "mt5", "umt5"])
def test_sums_past_the_largest_float16(name: str, tmp_path: Path) -> None:
    saved(name, torch.float16, tmp_path, LARGE)
    ours, theirs = errors(name, torch.float16, tmp_path)
    assert ours <= 2 * theirs


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "mt5", "umt5"])
def test_what_stays_in_float32(name: str, tmp_path: Path) -> None:
    """`wo` in float16 alone, as theirs; also in a model without weights, after saving and loading, and after `.to`."""
    saved(name, torch.float16, tmp_path / "theirs", LARGE)
    theirs = loaded(name, torch.float16, tmp_path / "theirs")
    kept = {name for name, parameter in theirs.named_parameters() if parameter.dtype == torch.float32}
    assert len(kept) == theirs.config.num_layers + theirs.config.num_decoder_layers
    model = load_model(tmp_path / "theirs", torch.float16)
    wide = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32]
    assert len(wide) == len(kept)
    assert all(name.endswith("feed_forward.down_proj.weight") for name in wide)
    save_model(model, tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    described = [empty_model(tmp_path / "ours"), empty_model(tmp_path / "theirs", torch.float16)]
    for other in (again, *described):
        assert [each.dtype for each in other.parameters()] == [each.dtype for each in model.parameters()]
    assert torch.equal(outputs(name, again), outputs(name, model))
    back = CONFIGS[name][0].from_pretrained(tmp_path / "ours").eval()
    assert {name for name, parameter in back.named_parameters() if parameter.dtype == torch.float32} == kept
    assert torch.equal(outputs(name, back), outputs(name, theirs))
    for dtype in (torch.bfloat16, torch.float32):
        assert {each.dtype for each in load_model(tmp_path / "ours", dtype).parameters()} == {dtype}
    assert {each.dtype for each in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "t5", "umt5"])
def test_greedy_tokens(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The reference's own, in each row up to where it finds two of them nearly alike; with caches and without."""
    saved(name, dtype, tmp_path, LARGE if dtype == torch.float16 else 1.0)
    model, theirs = load_model(tmp_path, dtype), loaded(name, dtype, tmp_path)
    source = ids(8, 9)
    # Without a cache: theirs takes the encoder's number of layers for the decoder's.
    options = {"use_cache": False, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = theirs.generate(source, max_new_tokens=10, **options)
    best = torch.stack(expected.logits, 1).float().topk(2).values
    sure = (best[..., 0] - best[..., 1] > (0.2 if dtype == torch.bfloat16 else 0.05) * best.std()).cummin(1).values
    assert sure.sum() > 10
    for use_cache in (True, False):
        written = model.generate(source, max_new_tokens=10, use_cache=use_cache)[:, -10:]
        assert (written == expected.sequences[:, -10:])[sure].all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["gemma, multi-query", "gemma2"])
def test_embeddings_times_a_factor_that_is_rounded_too(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The root of 24 is no number of 16 bits: theirs is 4.90625 in bfloat16."""
    saved(name, dtype, tmp_path)
    ours, theirs = load_model(tmp_path, dtype), loaded(name, dtype, tmp_path)
    tokens = ids(4, 16)
    assert torch.equal(ours.embedding(tokens), theirs.model.embed_tokens(tokens))
