"""LoRA adapters of PEFT on the projections of models that ranks share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.parallel.sharing import V, assert_same_gradients, decoder, mesh_of
from tests.ranks import on_ranks
from transformer.errors import ArgumentError
from transformer.parallel import parallelize

peft = pytest.importorskip("peft")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(targets: list[str], **options: object) -> nn.Module:
    """An adapted model in float64, with both matrices drawn."""
    model = peft.get_peft_model(
        decoder(attention="gqa", num_groups=4, tied_embeddings=True),
        peft.LoraConfig(r=3, target_modules=targets, **options),
    )
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.double()


def test_adapted_projections_on_two_ranks() -> None:
    on_ranks(2, _adapted)


def _adapted(_rank: int) -> None:
    mesh, ids = mesh_of(2), torch.randint(V, (2, 9))
    for targets in (PROJECTIONS, ["q_proj", "down_proj"], ["tokens"]):
        whole = adapted(targets)
        shared = parallelize(copy.deepcopy(whole), mesh)
        expected, found = whole(ids), shared(ids)
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
        with whole.disable_adapter(), shared.disable_adapter():
            without = whole(ids)
            assert not torch.allclose(expected, without)
            torch.testing.assert_close(shared(ids), without, atol=1e-11, rtol=1e-11)
        for logits in (expected, found):
            logits.square().mean().backward()
        trained = [each for each in whole.parameters() if each.requires_grad]
        assert len(trained) < len(list(whole.parameters()))
        for model in (whole, shared):
            for name, parameter in list(model.named_parameters()):
                assert parameter.requires_grad == ("lora_" in name), name
                if not parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        assert_same_gradients(whole, shared, 1e-11)
        whole.eval(), shared.eval()
        assert torch.equal(*(each.generate(input_ids=ids, max_new_tokens=5) for each in (whole, shared)))


def test_adapters_that_cannot_be_cut_are_refused() -> None:
    on_ranks(2, _refused)


def _refused(_rank: int) -> None:
    mesh = mesh_of(2)
    for targets, options in ((["proj"], {}), (["q_proj"], {"use_dora": True})):
        model = adapted(targets, **options)
        before = {name: id(each) for name, each in model.named_parameters()}
        with pytest.raises(ArgumentError, match="merge_and_unload"):
            parallelize(model, mesh)
        assert before == {name: id(each) for name, each in model.named_parameters()}
