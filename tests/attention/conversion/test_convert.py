"""Conversion of key/value heads: pooled heads are means, and repeated heads give the same outputs."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.setups import fill, padding, tokens
from transformer import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.attention import Attention, to_gqa, to_mha, to_mqa
from transformer.positions import ALiBi, RelativePositionBias, RotaryEmbedding

EMBED_DIM, HEADS, HEAD_DIM = 20, 6, 4
NAMES = [f"{projection}.{part}" for projection in ("k_proj", "v_proj") for part in ("weight", "bias")]

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "out bias alone": {"bias": False, "out_bias": True},
    "rotary": {"position": RotaryEmbedding(HEAD_DIM)},
    "alibi and window": {"position": ALiBi(HEADS), "window_size": 3},
    "t5 and softcap": {"position": RelativePositionBias(HEADS, 8, 16), "softcap": 2.0},
    "window, sinks, rotary": {"position": RotaryEmbedding(HEAD_DIM), "window_size": 3, "num_sinks": 2},
    "qk_norm and scale": {"qk_norm": nn.RMSNorm(HEAD_DIM), "scale": 0.3},
}


def grouped(num_groups: int, seed: int = 0, **options: object) -> GroupQueryAttention:
    options = {"apply_causal_mask": True, "head_dim": HEAD_DIM, **copy.deepcopy(options)}
    module = GroupQueryAttention(EMBED_DIM, HEADS, num_groups, **options).double()
    fill(module, seed)
    return module


def kind_of(num_groups: int) -> type[Attention]:
    return {1: MultiQueryAttention, HEADS: MultiHeadAttention}.get(num_groups, GroupQueryAttention)


def converted(module: nn.Module, num_groups: int) -> nn.Module:
    """Into the kind of its own that this number of key/value heads has."""
    if num_groups == 1:
        return to_mqa(module)
    return to_mha(module) if num_groups == HEADS else to_gqa(module, num_groups)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 0.0) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(("groups", "fewer"), [(6, 3), (6, 2), (6, 1), (3, 1), (2, 1)])
def test_pooled_heads_are_means_of_neighbours(groups: int, fewer: int) -> None:
    module = grouped(groups)
    before, pooled = parameters_of(module), converted(module, fewer)
    assert type(pooled) is kind_of(fewer)
    assert pooled.num_groups == fewer
    ratio = groups // fewer
    for name in NAMES:
        old, new = before[name].tolist(), pooled.get_parameter(name).tolist()
        assert len(new) == fewer * HEAD_DIM
        for group in range(fewer):
            for dim in range(HEAD_DIM):
                rows = [old[(group * ratio + member) * HEAD_DIM + dim] for member in range(ratio)]
                mean = sum(torch.tensor(row, dtype=torch.float64) for row in rows) / ratio
                row = torch.tensor(new[group * HEAD_DIM + dim], dtype=torch.float64)
                torch.testing.assert_close(row, mean, rtol=0, atol=1e-14)
    unpooled = {name: value for name, value in before.items() if name not in NAMES}
    equal({name: pooled.get_parameter(name).detach() for name in unpooled}, unpooled)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("groups", "more"), [(1, 6), (2, 6), (1, 3), (3, 6)])
def test_repeated_heads_leave_outputs_as_they_were(groups: int, more: int, options: dict[str, object]) -> None:
    module = grouped(groups, **options)
    repeated = converted(module, more)
    assert type(repeated) is kind_of(more)
    assert repeated.kv_cache is None
    x, mask = tokens(2, 9, EMBED_DIM), padding([(0, 9), (2, 6)], 9)
    given = [module(x, attention_mask=mask), repeated(x, attention_mask=mask)]
    torch.testing.assert_close(*given, rtol=0, atol=1e-12)
    for one in (module, repeated):
        one.use_kv_cache = True
    with torch.no_grad():
        for chunk, real in zip(x.split([4, 1, 1, 3], 1), mask.split([4, 1, 1, 3], 1), strict=True):
            given = [one(chunk, attention_mask=real) for one in (module, repeated)]
            torch.testing.assert_close(*given, rtol=0, atol=1e-12)
    assert repeated.kv_cache["key"].shape[1] == more


@pytest.mark.parametrize("groups", [1, 2])
def test_repeated_heads_leave_cross_attention_as_it_was(groups: int) -> None:
    module = grouped(groups, apply_causal_mask=False, kv_dim=7)
    x, source = tokens(2, 3, EMBED_DIM), tokens(2, 5, 7, seed=1)
    torch.testing.assert_close(to_mha(module)(x, source), module(x, source), rtol=0, atol=1e-12)


@pytest.mark.parametrize("between", [3, 2])
def test_pooling_in_two_steps_is_pooling_in_one(between: int) -> None:
    module = converted(grouped(6), 6)
    equal(parameters_of(to_mqa(to_gqa(module, between))), parameters_of(to_mqa(module)), 1e-12)


@pytest.mark.parametrize(("groups", "more"), [(1, 6), (2, 6), (3, 6), (1, 2)])
def test_pooling_repeated_heads_gives_them_back(groups: int, more: int) -> None:
    module = converted(grouped(groups), groups)
    equal(parameters_of(converted(converted(module, more), groups)), parameters_of(module), 1e-12)


def test_the_same_kind_is_a_copy_without_the_cache() -> None:
    module = to_mha(grouped(6, use_kv_cache=True))
    module(tokens(1, 3, EMBED_DIM))
    again = to_mha(module)
    assert again is not module
    assert (again.kv_cache, module.kv_cache.cached_length) == (None, 3)
    equal(parameters_of(again), parameters_of(module))


def test_everything_else_goes_along() -> None:
    module = grouped(
        2,
        use_kv_cache=True,
        dropout=0.25,
        position=RotaryEmbedding(HEAD_DIM, 77.0),
        window_size=5,
        num_sinks=1,
        scale=0.7,
        softcap=3.0,
        max_cache_length=8,
        qk_norm=nn.RMSNorm(HEAD_DIM),
    )
    module = module.to(torch.bfloat16).eval()
    module.k_norm.train()
    module.label = "third layer"
    module.register_buffer("seen", torch.arange(3))
    for name in ("k_proj.weight", "v_proj.bias", "q_proj.bias"):
        module.get_parameter(name).requires_grad_(False)
    module(tokens(1, 3, EMBED_DIM, dtype=torch.bfloat16))
    for changed in (to_mha(module), to_mqa(module), to_gqa(module, 6)):
        for name in ("apply_causal_mask", "use_kv_cache", "dropout", "window_size", "num_sinks", "max_cache_length"):
            assert getattr(changed, name) == getattr(module, name)
        assert (changed.kernel, changed.label, changed.kv_cache) == (module.kernel, "third layer", None)
        assert (changed.position.base, changed.position is module.position) == (77.0, False)
        assert (changed.training, changed.k_norm.training, changed.q_norm.training) == (False, True, False)
        equal(parameters_of(changed.k_norm), parameters_of(module.k_norm))
        assert changed.seen.tolist() == [0, 1, 2]
        for name, parameter in changed.named_parameters():
            like = module.get_parameter(name)
            assert (parameter.dtype, parameter.requires_grad) == (torch.bfloat16, like.requires_grad), name
            assert parameter.is_leaf
        assert changed.k_proj.out_features == changed.v_proj.weight.shape[0] == changed.num_groups * HEAD_DIM
        changed(tokens(1, 3, EMBED_DIM, dtype=torch.bfloat16))
        assert changed.kv_cache.cached_length == 3
        assert pickle.loads(pickle.dumps(changed)).num_groups == changed.num_groups
    assert module.kv_cache.cached_length == 3


def test_means_of_sixteen_bits_are_rounded_once() -> None:
    module = to_mha(grouped(6))
    exact = to_gqa(module.bfloat16().float(), 2).k_proj.weight.detach()
    assert torch.equal(to_gqa(module.bfloat16(), 2).k_proj.weight, exact.bfloat16())
    large = module.half()
    nn.init.constant_(large.v_proj.bias, 60000.0)
    assert torch.equal(to_mqa(large).v_proj.bias, torch.full((HEAD_DIM,), 60000.0, dtype=torch.half))


def test_the_meta_device_stays() -> None:
    module = to_mqa(MultiHeadAttention(EMBED_DIM, 4, device="meta"))
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


def test_no_random_number_is_drawn() -> None:
    module, state = grouped(2), torch.get_rng_state()
    to_mha(module), to_gqa(module, 6), to_mqa(module)
    assert torch.equal(torch.get_rng_state(), state)
