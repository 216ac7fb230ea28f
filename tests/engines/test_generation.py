"""transformers' own generate over the engines' modules, token for token against ours."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from transformer.engines import as_pretrained
from transformer.errors import ConfigurationError

from .compositions import CAPPED, NAMES, PARTS, VOCABULARY, model_of

LENGTH, NEW = 12, 14


def prompts(rows: int = 3) -> tuple[Tensor, Tensor]:
    """Prompts, and masks with padding on the left of the first two."""
    ids = torch.randint(1, VOCABULARY, (rows, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1:2, :1] = 0
    return ids, mask


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name: str, way: str) -> None:
    model = model_of(name)
    ids, mask = prompts()
    expected = model.generate(ids, mask, max_new_tokens=NEW, temperature=0.0)
    got = as_pretrained(model).generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **WAYS[way]
    )
    assert torch.equal(got[:, LENGTH:], expected[:, LENGTH:])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup(name: str) -> None:
    model = model_of(name)
    ids, _ = prompts(1)
    expected = model.generate(ids, max_new_tokens=NEW, temperature=0.0)
    got = as_pretrained(model).generate(ids, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 10}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize("name", ["gqa, llama3, qk_norm", "parts: everything differs"])
def test_sampled_tokens_of_one_seed(name: str, options: dict[str, Any]) -> None:
    """Both draw a step's tokens by one call of the same generator, so one seed gives the same tokens."""
    model = model_of(name)
    engine = as_pretrained(model)
    ids, _ = prompts()
    torch.manual_seed(3)
    expected = model.generate(ids, max_new_tokens=NEW, temperature=0.8, **options)
    for _ in range(2):
        torch.manual_seed(3)
        sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0} | options
        assert torch.equal(engine.generate(ids, max_new_tokens=NEW, **sampling), expected)


@pytest.mark.parametrize("name", ["gqa, llama3, qk_norm", "none, windows", "parts: learned and rotary, windows"])
def test_beams(name: str) -> None:
    model = model_of(name)
    ids, mask = prompts()
    expected = model.generate(ids, mask, max_new_tokens=NEW, temperature=0.0, num_beams=3)
    got = as_pretrained(model).generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, num_beams=3, pad_token_id=0
    )
    assert torch.equal(got[:, LENGTH:], expected[:, LENGTH:])


def test_stop_and_pad_tokens_are_those_of_the_model() -> None:
    model = model_of("rotary, mha")
    ids, _ = prompts()
    free = model.generate(ids, max_new_tokens=NEW, temperature=0.0)
    stop = int(free[0, LENGTH + 4])
    stopping = type(model)(**model.config.to_dict() | {"stop_tokens": (stop, 60), "pad_token": 0, "start_token": 2})
    stopping.load_state_dict(model.state_dict())
    engine = as_pretrained(stopping.eval())
    config = engine.generation_config
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ([stop, 60], 0, 2)
    expected = stopping.generate(ids, max_new_tokens=NEW, temperature=0.0)
    assert torch.equal(engine.generate(ids, max_new_tokens=NEW, do_sample=False), expected)


@pytest.mark.parametrize("name", ["gqa, llama3, qk_norm", "none, windows", "learned, layer norm, plain"])
def test_continuous_batching(name: str) -> None:
    model = model_of(name)
    rows = [row.tolist()[: 5 + index] for index, row in enumerate(prompts()[0])]
    results = as_pretrained(model).generate_batch(
        rows,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
        progress_bar=False,
    )
    for row, result in zip(rows, results.values(), strict=True):
        expected = model.generate(torch.tensor([row]), max_new_tokens=NEW, temperature=0.0)
        assert result.generated_tokens == expected[0, len(row) :].tolist()


@pytest.mark.parametrize("name", [*PARTS, *CAPPED])
def test_what_continuous_batching_computes_wrongly_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="generate_batch: expected one window size"):
        as_pretrained(model_of(name)).generate_batch([[1, 2, 3]])


@pytest.mark.parametrize("name", CAPPED)
def test_a_soft_cap_is_eager_and_sdpa_is_refused(name: str) -> None:
    engine = as_pretrained(model_of(name))
    assert engine.config._attn_implementation == "eager"
    with pytest.raises(ConfigurationError, match=r"attn_implementation: .*soft cap"):
        engine.set_attn_implementation("sdpa")
