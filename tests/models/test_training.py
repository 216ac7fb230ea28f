"""Training: the loss falls, gradients reach all parameters, dropout is active, and tied weights stay tied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.models.variants import VARIANTS, VOCAB, decoder_only, encoder_decoder, ids
from tests.setups import padding


def loss_of(model: nn.Module, tokens: Tensor, real: Tensor) -> Tensor:
    """Teacher forcing: the token after each one, of rows of different lengths; sources are the rows themselves."""
    source = (tokens,) if hasattr(model, "encoder") else ()
    masks = (real, real[:, :-1]) if source else (real[:, :-1],)
    logits = model(*source, tokens[:, :-1], *masks)
    return cross_entropy(logits[real[:, 1:]], tokens[:, 1:][real[:, 1:]])


@pytest.mark.slow
@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_falls_and_every_parameter_learns(variant: str, build) -> None:
    model = build(variant, torch.float32).train()
    tokens, real = ids(4, 8), padding([(0, 8), (0, 5), (0, 8), (0, 3)], 8)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = loss_of(model, tokens, real)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            if not name.endswith("k_proj.bias"):  # which moves all scores of a query alike
                assert parameter.grad.abs().sum() > 0, name
        losses.append(loss.item())
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    assert model.kv_cache is None


@pytest.mark.parametrize("build", [decoder_only, encoder_decoder])
def test_dropout_acts_in_training_alone(build) -> None:
    model, tokens = build(dropout=0.3), ids(2, 6)
    given = (tokens,) if build is decoder_only else (tokens, tokens)
    plain = build(dropout=0.0)
    assert torch.equal(model(*given), plain(*given))
    model.train()
    assert not torch.equal(model(*given), model(*given))
    places = [module for module in model.modules() if getattr(module, "p", None) == 0.3]
    assert places
    model.eval()
    assert torch.equal(model(*given), plain(*given))


def test_tied_weights_stay_tied() -> None:
    """Through casts, state dicts and steps of an optimiser; shared embeddings of an encoder-decoder are one table."""
    tied = {"tied_embeddings": True}
    decoder = decoder_only(**tied).float()
    source = ids(1, 4)
    assert decoder.head.proj.weight is decoder.embedding.tokens.weight
    assert len(list(decoder.parameters())) + 1 == len(decoder.state_dict())
    again = decoder_only(**tied).float()
    state = {name: weight + 1 for name, weight in decoder.state_dict().items()}
    again.load_state_dict(state)
    assert torch.equal(again.embedding.tokens.weight, state["head.proj.weight"])
    assert again.head.proj.weight is again.embedding.tokens.weight
    with torch.no_grad():
        again.embedding.tokens.weight.zero_()
    assert (again(source) == 0).all()
    model = type(encoder_decoder())(VOCAB, VOCAB, 16, 4, 20, 1, shared_embeddings=True).to(torch.float64)
    table = model.target_embedding.tokens.weight
    assert model.source_embedding.tokens.weight is table
    assert model.head.proj.weight is table
    untied = decoder_only(tied_embeddings=False)
    assert untied.head.proj.weight is not untied.embedding.tokens.weight
