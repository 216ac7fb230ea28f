"""Quantisation of torchao, the summary of torchinfo, and attributions of captum over our models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchinfo
from torch import Tensor
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tests.integration.builders import decoder, encoder, encoder_decoder, token_ids


@pytest.mark.parametrize("build", [decoder, encoder_decoder])
@pytest.mark.parametrize("d_model", [32, 512])
def test_weights_that_torchao_quantises(build: Callable, d_model: int) -> None:
    """Their class is another, and so is their way through a linear."""
    model, plain, ids = build(d_model=d_model), build(d_model=d_model), token_ids(2, 6)
    quantize_(model, Int8WeightOnlyConfig())
    inputs = (ids, ids) if build is encoder_decoder else (ids,)
    with torch.no_grad():
        for each in (inputs, tuple(given[:1, :1] for given in inputs)):
            # Eight bits keep two decimals or so of a logit of size one.
            assert_close(model(*each), plain(*each), atol=0.1, rtol=0)
    said = [model.generate(ids, max_new_tokens=6, use_cache=use) for use in (True, False)]
    assert torch.equal(*said)


@pytest.mark.parametrize("build", [decoder, encoder, encoder_decoder])
def test_torchinfo_counts_every_parameter(build: Callable) -> None:
    """Once each; of a weight that two modules share it counts both, as of any model."""
    model, ids = build(tied_embeddings=False), token_ids(2, 6)
    inputs = [ids, ids] if build is encoder_decoder else [ids]
    summary = torchinfo.summary(model, input_data=inputs, verbose=0)
    assert summary.total_params == sum(parameter.numel() for parameter in model.parameters())
    assert summary.trainable_params == summary.total_params
    with torch.no_grad():
        assert torch.equal(model(*inputs), build(tied_embeddings=False)(*inputs))


@pytest.mark.parametrize("options", [{}, {"position": "alibi", "window_size": 3, "num_sinks": 1}])
def test_captum_explains_a_logit(options: dict) -> None:
    """Attributions add up to what changed between the baseline and the text."""
    attributions = pytest.importorskip("captum.attr")
    model, ids, baseline = decoder(**options), token_ids(1, 5), torch.zeros(1, 5, dtype=torch.int64)

    def score(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return model(ids, mask)[:, -1, 7]

    explain = attributions.LayerIntegratedGradients(score, model.embedding.tokens)
    parts, error = explain.attribute(ids, baseline, n_steps=100, return_convergence_delta=True)
    assert parts.shape == (1, 5, 32)
    assert_close(parts.sum(), (score(ids) - score(baseline)).sum(), atol=1e-2, rtol=0)
    assert error.abs().max() < 1e-2
    ends = [model.embedding(each).detach() for each in (ids, baseline)]
    of_vectors = attributions.IntegratedGradients(lambda vectors: model(inputs_embeds=vectors)[:, -1, 7])
    assert_close(of_vectors.attribute(*ends, n_steps=100).sum(), parts.sum(), atol=1e-2, rtol=0)
    ablation = attributions.FeatureAblation(score).attribute(ids, baselines=baseline)
    changed = ids.clone()
    changed[0, 1] = 0
    assert_close(ablation[0, 1].double(), (score(ids) - score(changed)).double().squeeze().detach(), atol=1e-5, rtol=0)
