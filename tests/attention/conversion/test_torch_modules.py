"""Conversion between `torch.nn.MultiheadAttention` and `MultiHeadAttention`, bit for bit in both directions."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.setups import fill, padding, tokens
from transformer import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.attention import from_torch, to_mha, to_torch

EMBED_DIM, HEADS, LENGTH = 12, 3, 7

FORMS = {
    "packed": {},
    "packed, no bias": {"bias": False},
    "batch first": {"batch_first": True, "dropout": 0.25},
    "separate": {"kdim": 5, "vdim": 5},
    "separate, no bias": {"kdim": 5, "vdim": 5, "bias": False},
}


def torch_attention(**options: object) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(EMBED_DIM, HEADS, **options).double()
    fill(module, seed=3)
    return module.eval()


def called(
    theirs: nn.MultiheadAttention, x: Tensor, source: Tensor, real: Tensor, causal: bool = False
) -> list[Tensor]:
    """Torch's output and weights, batch first, independent of `theirs`."""
    hidden = torch.ones(x.shape[1], source.shape[1], dtype=torch.bool).triu(1) if causal else None
    if not theirs.batch_first:
        x, source = x.transpose(0, 1), source.transpose(0, 1)
    out, weights = theirs(x, source, source, ~real, attn_mask=hidden, average_attn_weights=False)
    return [out if theirs.batch_first else out.transpose(0, 1), weights]


def same(ours: tuple[Tensor, Tensor] | list[Tensor], theirs: list[Tensor]) -> None:
    for own, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_equal_outputs_and_weights_and_back(options: dict[str, object]) -> None:
    theirs = torch_attention(**options)
    ours = from_torch(theirs)
    assert (type(ours), type(ours.out_proj)) == (MultiHeadAttention, nn.Linear)
    x, source = tokens(2, 4, EMBED_DIM), tokens(2, LENGTH, theirs.kdim, seed=1)
    real = padding([(0, LENGTH), (2, 4)], LENGTH)
    expected = called(theirs, x, source, real)
    same(ours(x, source, kv_mask=real, return_weights=True), expected)
    back = to_torch(ours)
    assert (type(back), back.batch_first, back.dropout) == (nn.MultiheadAttention, True, theirs.dropout)
    assert type(back.out_proj) is type(theirs.out_proj)
    equal(state(back), state(theirs))
    same(called(back, x, source, real), expected)
    equal(state(from_torch(back)), state(ours))


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_with_padding_and_in_chunks(causal: bool) -> None:
    theirs = torch_attention()
    ours = from_torch(theirs, apply_causal_mask=causal, use_kv_cache=causal)
    assert (ours.apply_causal_mask, ours.use_kv_cache) == (causal, causal)
    x, real = tokens(2, LENGTH, EMBED_DIM), padding([(0, LENGTH), (0, 4)], LENGTH)
    expected = called(theirs, x, x, real, causal)[0][real]
    with torch.no_grad():
        lengths = [4, 1, 2] if causal else [LENGTH]
        pairs = zip(x.split(lengths, 1), real.split(lengths, 1), strict=True)
        out = torch.cat([ours(chunk, attention_mask=mask) for chunk, mask in pairs], 1)
    torch.testing.assert_close(out[real], expected, rtol=0, atol=1e-12)
    back = called(to_torch(ours), x, x, real, causal)[0][real]
    torch.testing.assert_close(back, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_dim", [EMBED_DIM, 5])
@pytest.mark.parametrize("build", [MultiQueryAttention, partial(GroupQueryAttention, num_groups=2)])
def test_fewer_heads_are_repeated_on_the_way_to_torch(build: partial[nn.Module], kv_dim: int) -> None:
    module = build(EMBED_DIM, 6, kv_dim=kv_dim).double()
    fill(module, seed=4)
    x, source, real = tokens(2, 4, EMBED_DIM), tokens(2, 5, kv_dim, seed=1), padding([(0, 5), (1, 2)], 5)
    theirs = to_torch(module)
    same(called(theirs, x, source, real), module(x, source, kv_mask=real, return_weights=True))
    equal(state(theirs), state(to_torch(to_mha(module))))


def test_everything_else_goes_along() -> None:
    theirs = torch_attention(dropout=0.25, kdim=5, vdim=5).bfloat16()
    theirs.k_proj_weight.requires_grad_(False)
    theirs.out_proj.bias.requires_grad_(False)
    ours = from_torch(theirs)
    assert (ours.dropout, ours.training, ours.kv_dim) == (0.25, False, 5)
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert frozen == {"k_proj.weight", "out_proj.bias"}
    back = to_torch(ours)
    assert {p.dtype for p in (*ours.parameters(), *back.parameters())} == {torch.bfloat16}
    assert not any(module.training for module in (*ours.modules(), *back.modules()))
    frozen = {name for name, parameter in back.named_parameters() if not parameter.requires_grad}
    assert frozen == {"k_proj_weight", "out_proj.bias"}
    theirs = torch_attention().train()
    theirs.in_proj_weight.requires_grad_(False)
    ours = from_torch(theirs)
    assert (ours.training, ours.q_proj.weight.requires_grad, ours.q_proj.bias.requires_grad) == (True, False, True)
    assert to_torch(ours).in_proj_weight.requires_grad is False
    assert to_torch(ours).training


@pytest.mark.parametrize("kdim", [EMBED_DIM, 5])
def test_nothing_is_shared_and_no_random_number_drawn(kdim: int) -> None:
    theirs = torch_attention(kdim=kdim, vdim=kdim)
    before, random = state(theirs), torch.get_rng_state()
    ours = from_torch(theirs)
    back = to_torch(ours)
    assert torch.equal(torch.get_rng_state(), random)
    own = state(ours)
    for parameter in back.parameters():
        nn.init.zeros_(parameter)
    equal(state(ours), own)
    ours(tokens(1, 2, EMBED_DIM), tokens(1, 2, kdim)).sum().backward()
    for parameter in ours.parameters():
        assert parameter.grad is not None
        nn.init.zeros_(parameter)
    equal(state(theirs), before)
    assert all(parameter.grad is None for parameter in theirs.parameters())


def test_weights_that_torch_keeps_apart_stay_tied() -> None:
    module = MultiHeadAttention(EMBED_DIM, HEADS, kv_dim=5)
    module.v_proj.weight = module.k_proj.weight
    theirs = to_torch(module)
    assert theirs.k_proj_weight is theirs.v_proj_weight
    ours = from_torch(theirs)
    assert ours.k_proj.weight is ours.v_proj.weight


def test_whole_models_keep_what_is_shared() -> None:
    first, second = torch_attention(), torch_attention()
    second.in_proj_weight, second.out_proj = first.in_proj_weight, first.out_proj
    model = nn.ModuleDict({"a": first, "b": second, "again": first, "head": nn.Linear(EMBED_DIM, EMBED_DIM).double()})
    model["head"].weight = first.out_proj.weight
    model.probe = first.out_proj
    before = state(model)
    ours = from_torch(model, apply_causal_mask=True)
    assert all(type(ours[name]) is MultiHeadAttention and ours[name].apply_causal_mask for name in ("a", "b", "again"))
    assert ours["a"] is ours["again"] is not ours["b"]
    assert ours["a"].v_proj.weight is ours["b"].v_proj.weight
    assert ours["a"].v_proj.bias is not ours["b"].v_proj.bias
    assert ours["head"].weight is ours["a"].out_proj.weight is ours["b"].out_proj.weight
    assert ours.probe is ours["a"].out_proj is ours["b"].out_proj
    back = to_torch(ours)
    assert back["a"] is back["again"] is not back["b"]
    assert back["a"].in_proj_weight is back["b"].in_proj_weight
    assert back.probe is back["a"].out_proj
    assert back["head"].weight is back["a"].out_proj.weight
    for copied in (model, back):
        equal(state(copied), before)
