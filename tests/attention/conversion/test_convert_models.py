"""Conversion of whole models: shared modules stay shared in the copy, which shares nothing with the original."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.setups import fill, tokens
from transformer import GroupQueryAttention, MultiHeadAttention, MultiQueryAttention
from transformer.attention import Attention, to_gqa, to_mha, to_mqa
from transformer.positions import RelativePositionBias, RotaryEmbedding

EMBED_DIM, HEADS, HEAD_DIM, VOCABULARY = 16, 4, 4, 11


class Layer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(EMBED_DIM)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class Model(nn.Module):
    """Layers of every kind, two of them with one rotary, two with one bias, two with one attention; tied in and out."""

    def __init__(self) -> None:
        super().__init__()
        rotary, bias = RotaryEmbedding(HEAD_DIM), RelativePositionBias(HEADS, 8, 16)
        twice = GroupQueryAttention(EMBED_DIM, HEADS, 2, True, position=bias, window_size=3)
        self.embedding = nn.Embedding(VOCABULARY, EMBED_DIM)
        self.layers = nn.ModuleList(
            Layer(attention)
            for attention in (
                MultiHeadAttention(EMBED_DIM, HEADS, True, position=rotary),
                MultiQueryAttention(EMBED_DIM, HEADS, True, position=rotary),
                twice,
                MultiHeadAttention(EMBED_DIM, HEADS, True, position=bias),
                twice,
            )
        )
        self.out = nn.Linear(EMBED_DIM, VOCABULARY, bias=False)
        self.out.weight = self.embedding.weight
        # A layer may know of its neighbours, without owning them.
        self.layers[0].attention.__dict__["model"] = self
        fill(self, 0)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)

    @property
    def attentions(self) -> list[Attention]:
        return [layer.attention for layer in self.layers]


TOKENS = torch.arange(14).view(2, 7) % VOCABULARY
TARGETS = {
    "MHA": (to_mha, MultiHeadAttention, HEADS),
    "GQA": (lambda model: to_gqa(model, 2), GroupQueryAttention, 2),
    "MQA": (to_mqa, MultiQueryAttention, 1),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> tuple:
    return TARGETS[request.param]


def test_every_attention_is_converted_as_if_alone(target: tuple) -> None:
    convert, kind, num_groups = target
    model = Model()
    changed = convert(model)
    assert type(changed) is Model
    for old, new in zip(model.attentions, changed.attentions, strict=True):
        assert (type(new), new.num_groups) == (kind, num_groups)
        equal(state(new), state(convert(old)))
    if kind is MultiHeadAttention:
        torch.testing.assert_close(changed(TOKENS), model(TOKENS), rtol=0, atol=1e-12)


def test_what_is_shared_stays_shared(target: tuple) -> None:
    model = Model()
    changed = target[0](model)
    first, second, third, fourth, fifth = changed.attentions
    assert third is fifth
    assert first.position is second.position
    assert third.position is fourth.position
    assert changed.out.weight is changed.embedding.weight
    assert first.model is changed
    assert len(list(changed.parameters())) == len(list(model.parameters()))
    assert len(list(changed.modules())) == len(list(model.modules()))


def test_nothing_is_shared_with_the_original(target: tuple) -> None:
    model = Model()
    before, out = state(model), model(TOKENS)
    modules, parameters = list(model.modules()), list(model.parameters())
    changed = target[0](model)
    assert not {*map(id, modules)} & {*map(id, changed.modules())}
    assert not {t.data_ptr() for t in parameters} & {t.data_ptr() for t in changed.parameters()}
    own = state(changed)
    changed(TOKENS).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in changed.parameters())
    assert {name for name, p in changed.named_parameters() if not p.grad.any()} <= {"layers.1.attention.k_proj.bias"}
    assert all(parameter.grad is None for parameter in parameters)
    fill(changed, 9)
    equal(state(model), before)
    assert torch.equal(model(TOKENS), out)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    changed = target[0](model)
    fill(model, 9)
    equal(state(changed), own)


def test_tied_projections_stay_tied() -> None:
    model = nn.ModuleList(MultiHeadAttention(EMBED_DIM, HEADS) for _ in range(3))
    model[1].k_proj = model[0].k_proj
    model[2].v_proj.weight = model[1].v_proj.weight = model[2].k_proj.weight
    changed = to_gqa(model, 2)
    assert changed[1].k_proj is changed[0].k_proj
    assert changed[2].v_proj.weight is changed[1].v_proj.weight is changed[2].k_proj.weight
    assert changed[0].v_proj.weight is not changed[2].v_proj.weight
    for attention in changed:
        attention(tokens(1, 3, EMBED_DIM, dtype=torch.float32))


def test_caches_stay_behind_and_the_copy_decodes() -> None:
    model = Model()
    model.layers[4].attention = copy.deepcopy(model.layers[2].attention)
    expected = model(TOKENS)
    for attention in model.attentions:
        attention.use_kv_cache = True
    with torch.no_grad():
        model(TOKENS[:, :3])
        changed = to_mha(model)
        assert all(attention.kv_cache is None for attention in changed.attentions)
        assert [attention.kv_cache.length for attention in model.attentions] == [3] * 5
        out = torch.cat([changed(chunk) for chunk in TOKENS.split([3, 1, 3], 1)], 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert [attention.kv_cache.length for attention in model.attentions] == [3] * 5


def test_what_need_not_be_rebuilt_may_be_anything() -> None:
    class Own(MultiHeadAttention):
        pass

    seen = []
    model = nn.ModuleList([Own(EMBED_DIM, HEADS), GroupQueryAttention(EMBED_DIM, HEADS, HEADS)])
    model[0].register_forward_hook(lambda *_: seen.append("own"))
    model[1].k_proj = nn.Sequential(nn.Linear(EMBED_DIM, EMBED_DIM))
    model[1].q_proj.register_forward_hook(lambda *_: seen.append("query"))
    changed = to_mha(model)
    assert [type(attention) for attention in changed] == [Own, MultiHeadAttention]
    x = tokens(1, 3, EMBED_DIM, dtype=torch.float32)
    for old, new in zip(model, changed, strict=True):
        assert torch.equal(new(x), old(x))
    assert seen == ["own", "own", "query", "query"]
