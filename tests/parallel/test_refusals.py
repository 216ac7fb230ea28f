"""Refusals of models, meshes and ranks that do not fit: in a sentence, on every rank, before anything changes."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.utils.parametrizations import weight_norm

from tests.parallel.sharing import V, decoder, mesh_of, unsettled
from tests.ranks import on_ranks
from transformer import GroupQueryAttention, MultiHeadAttention
from transformer.attention import to_gqa
from transformer.blocks import FeedForward, GatedFeedForward, MixtureOfExperts
from transformer.errors import ArgumentError, CacheStateError, RanksError, ShapeError
from transformer.models import LanguageHead, TokenEmbedding
from transformer.parallel import parallelize
from transformer.positions import RotaryEmbedding, ScoreBias


class OwnBias(ScoreBias):
    num_heads = 4

    def bias(self, distance: Tensor) -> Tensor:
        return distance.unsqueeze(-3).expand(*distance.shape[:-2], 4, *distance.shape[-2:]).float()


class OwnRotation(RotaryEmbedding):
    def __init__(self) -> None:
        super().__init__(4)
        self.factor = nn.Parameter(torch.ones(()))


class OwnNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _tied_to_a_linear() -> nn.Module:
    model = nn.ModuleDict({"table": TokenEmbedding(V, 16), "head": LanguageHead(16, V), "other": nn.Linear(16, V)})
    model["other"].weight = model["table"].tokens.weight
    return model


def _shared_by_two_roles() -> nn.Module:
    model = nn.ModuleDict({"attention": MultiHeadAttention(16, 4), "other": FeedForward(16, 16)})
    model["other"].down_proj = model["attention"].q_proj
    return model


def _hooked() -> nn.Module:
    model = FeedForward(16, 32)
    model.up_proj.forward = lambda x: x
    return model


def _bounded() -> nn.Module:
    model = TokenEmbedding(V, 16)
    model.tokens.max_norm = 1.0
    return model


def _normalised() -> nn.Module:
    model = FeedForward(16, 32)
    weight_norm(model.up_proj)
    return model


UNFIT: list[tuple[object, str]] = [
    (lambda: nn.Linear(16, 16), "model: expected a module with attention"),
    (lambda: MultiHeadAttention(18, 3), "num_heads to be a multiple of the 2 ranks"),
    (lambda: GroupQueryAttention(16, 4, 1), r"num_groups .* got 1; .* to_gqa\(model, 2\)"),
    (lambda: GroupQueryAttention(24, 6, 3), r"num_groups .* got 3; .* to_gqa\(model, 6\)"),
    (lambda: nn.ModuleList([GatedFeedForward(16, 33)]), r"0.gate_proj: dimension 0 of its weight: .* got 33"),
    (lambda: nn.ModuleList([GatedFeedForward(16, 32), MixtureOfExperts(16, 32, 4, 2)]), "1: .* no ranks share yet"),
    (lambda: MultiHeadAttention(16, 4, position=OwnBias()), "ALiBi or RelativePositionBias"),
    (lambda: MultiHeadAttention(16, 4, position=OwnRotation()), "rotation without parameters"),
    (lambda: MultiHeadAttention(16, 4, sink_logits=True), "without sink_logits"),
    (lambda: MultiHeadAttention(16, 4, mask_rule=torch.ge), "without mask_rule and score_rule"),
    (lambda: MultiHeadAttention(16, 4, qk_norm=OwnNorm), "q_norm: expected a norm"),
    (
        lambda: MultiHeadAttention(16, 4, qk_norm=nn.LayerNorm, qk_norm_per_head=False),
        "q_norm: expected a plain RMSNorm",
    ),
    (lambda: FeedForward(16, 32, nn.PReLU()), "activation without parameters"),
    (_tied_to_a_linear, "tied parameter to be cut in one way"),
    (_shared_by_two_roles, "cut in one way"),
    (_hooked, "up_proj: expected a plain Linear"),
    (_normalised, "up_proj: expected a plain Linear"),
    (_bounded, "tokens: expected a plain Embedding"),
]


def _state_of(model: nn.Module) -> list[tuple[type, dict[str, int]]]:
    """The class of each module, and the identity of each of its parameters, modules and attributes."""
    return [
        (type(each), {name: id(value) for name, value in {**vars(each), **each._parameters, **each._modules}.items()})
        for each in model.modules()
    ]


def test_models_and_meshes_that_do_not_fit() -> None:
    on_ranks(2, _unfit)


def _unfit(rank: int) -> None:
    mesh = mesh_of(2)
    for make, message in UNFIT:
        model = make()
        before = _state_of(model)
        with pytest.raises(ArgumentError, match=message):
            parallelize(model, mesh)
        assert _state_of(model) == before, message
    # The remedy that a message names.
    parallelize(unsettled(to_gqa(GroupQueryAttention(24, 6, 3), 6)), mesh)
    with pytest.raises(ArgumentError, match="mesh: expected a DeviceMesh"):
        parallelize(decoder(), None)
    with pytest.raises(ArgumentError, match=r"one dimension, got 2 of sizes \(1, 2\); give one, such as mesh\['t'\]"):
        parallelize(decoder(), init_device_mesh("cpu", (1, 2), mesh_dim_names=("d", "t")))
    with pytest.raises(ArgumentError, match="gather_logits"):
        parallelize(decoder(), mesh, gather_logits=1)
    with pytest.raises(ArgumentError, match="Module, got str"):
        parallelize("model", mesh)
    alone = DeviceMesh("cpu", [0])
    if rank:
        with pytest.raises(ArgumentError, match=r"ranks \[0\] on rank 1"):
            parallelize(decoder(), alone)
    shared = parallelize(decoder(), mesh)
    with pytest.raises(ArgumentError, match="parallelize a model once"):
        parallelize(shared, mesh)
    talking = decoder().eval().enable_cache()
    with torch.no_grad():
        talking(torch.randint(V, (1, 3)))
    with pytest.raises(CacheStateError, match=r"got a conversation in decoder\.blocks\.0\.attention"):
        parallelize(talking, mesh)
    attention = parallelize(unsettled(MultiHeadAttention(16, 4)), mesh)
    with pytest.raises(ShapeError, match="H = 4, the heads of all ranks"):
        attention(torch.randn(1, 3, 16), attn_bias=torch.zeros(1, 2, 3, 3))


def test_ranks_that_differ() -> None:
    on_ranks(2, _unequal)


def _unequal(rank: int) -> None:
    mesh = mesh_of(2)
    torch.manual_seed(rank)
    other = FeedForward(16, 32)
    with pytest.raises(RanksError, match=r"down_proj\.bias with other numbers on rank 1 than on rank 0 \(4 differ\)"):
        parallelize(other, mesh)
    with pytest.raises(RanksError, match="with another shape or dtype on rank 1"):
        parallelize(FeedForward(16, 32 + 2 * rank), mesh)
    with pytest.raises(RanksError, match="gather_logits: expected the same"):
        parallelize(unsettled(FeedForward(16, 32)), mesh, gather_logits=bool(rank))
    # A rank that refuses its own model tells the others.
    with pytest.raises((RanksError, ArgumentError), match="got 33"):
        parallelize(FeedForward(16, 32 + rank), mesh)
    assert all(type(each) is nn.Parameter for each in other.parameters())


def test_a_rank_that_ends_is_told() -> None:
    on_ranks(2, _ends)


def _ends(rank: int) -> None:
    # A group of its own with a short patience: the run itself still joins its ranks in the end.
    group = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    mesh = DeviceMesh.from_group(group, "cpu")
    shared = parallelize(decoder().eval(), mesh)
    if rank == 1:
        return
    ids = torch.randint(V, (1, 4))
    with torch.no_grad(), pytest.raises(RanksError, match="expected every rank that shares the model"):
        shared(ids)
    with pytest.raises(RanksError, match="expected every rank that shares the model"):
        shared(ids)
    with pytest.raises(RanksError, match="expected every rank that shares the model"):
        shared.generate(ids, max_new_tokens=2)
