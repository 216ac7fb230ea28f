"""One graph of the engines' modules: compiled over a static cache, and exported."""

import pytest
import torch
from transformers import StaticCache

from transformer.engines import as_pretrained

from .compositions import VOCABULARY, model_of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none, windows", "sinusoidal, after", "parts: everything differs"])
@torch.no_grad()
def test_steps_over_a_static_cache_are_one_graph(name: str) -> None:
    model = model_of(name)
    engine = as_pretrained(model)
    ids = torch.randint(VOCABULARY, (2, 12))
    cache = StaticCache(engine.config, max_cache_len=16)
    engine(ids[:, :8], past_key_values=cache)
    compiled = torch.compile(engine, fullgraph=True, backend="eager")
    found = []
    for position in range(8, 12):
        positions = torch.full((2, 1), position)
        masks = engine.create_masks_for_generate(engine.config, torch.empty(2, 1, 0), None, cache, positions)
        part = ids[:, position : position + 1]
        found.append(
            compiled(part, attention_mask=masks, position_ids=positions, past_key_values=cache, use_cache=True).logits
        )
    torch.testing.assert_close(torch.cat(found, 1), model(ids)[:, 8:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_export() -> None:
    model = model_of("gqa, llama3, qk_norm")
    ids = torch.randint(VOCABULARY, (2, 12))
    program = torch.export.export(as_pretrained(model), (ids,), {"use_cache": False}).module()
    other = torch.randint(VOCABULARY, (2, 12))
    torch.testing.assert_close(program(other, use_cache=False).logits, model(other), atol=1e-5, rtol=0)
