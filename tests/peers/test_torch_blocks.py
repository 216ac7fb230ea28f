"""Layers, encoders and decoders of `torch.nn` rebuilt as blocks: equal outputs and gradients, nothing shared."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.peers.models import fill
from tests.setups import padding, tokens
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock
from transformer.blocks.from_torch import from_torch
from transformer.errors import ArgumentError

EMBED_DIM, NUM_HEADS, HIDDEN_DIM, LENGTH, SOURCE = 24, 4, 40, 7, 5
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
LAYERS = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}
IN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
DECODER_NAMES = {
    "attention.out_proj": "self_attn.out_proj",
    "attention_residual.norm_before": "norm1",
    "cross_attention.out_proj": "multihead_attn.out_proj",
    "cross_attention_residual.norm_before": "norm2",
    "feed_forward.up_proj": "linear1",
    "feed_forward.down_proj": "linear2",
    "feed_forward_residual.norm_before": "norm3",
}


def torch_layer(kind: str, **options: object) -> nn.Module:
    layer = LAYERS[kind](EMBED_DIM, NUM_HEADS, HIDDEN_DIM, **{"dropout": 0.1, "batch_first": True, **options})
    fill(layer.double().eval())
    return layer


def torch_stack(kind: str, norm: nn.Module | None, **options: object) -> nn.Module:
    layer = torch_layer(kind, **options)
    if kind == "decoder":
        stack: nn.Module = nn.TransformerDecoder(layer, 3, norm)
    else:
        nested = layer.self_attn.batch_first and not layer.norm_first
        stack = nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=nested)
    fill(stack.double().eval())
    return stack


class Call:
    """The same input for both: rows with padding, and a source with other rows of it."""

    def __init__(self, kind: str, causal: bool) -> None:
        self.kind = kind
        self.x, self.source = tokens(3, LENGTH, EMBED_DIM), tokens(3, SOURCE, EMBED_DIM, seed=1)
        # No padding on the left of a causal row: torch's output for such a token, which sees nothing, is NaN.
        self.real = padding([(0, LENGTH), (0, 4), (0 if causal else 3, 3)], LENGTH)
        self.source_real = padding([(2, 3), (0, SOURCE), (0, 1)], SOURCE)
        self.hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else None

    def theirs(self, module: nn.Module) -> Tensor:
        layer = module if isinstance(module, tuple(LAYERS.values())) else module.layers[0]
        turn = (lambda x: x) if layer.self_attn.batch_first else (lambda x: x.transpose(0, 1))
        x, source, real, source_real = turn(self.x), turn(self.source), self.real, self.source_real
        if self.kind == "encoder":
            return turn(module(x, self.hidden, src_key_padding_mask=~real))
        masks = {"tgt_key_padding_mask": ~real, "memory_key_padding_mask": ~source_real}
        return turn(module(x, source, tgt_mask=self.hidden, **masks))

    def ours(self, module: nn.Module) -> Tensor:
        if self.kind == "encoder":
            return module(self.x, attention_mask=self.real)
        return module(self.x, self.source, attention_mask=self.real, source_mask=self.source_real)

    def compare(self, ours: nn.Module, theirs: nn.Module) -> None:
        close(self.ours(ours)[self.real], self.theirs(theirs)[self.real])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str, norm_first: bool, activation: str, bias: bool, batch_first: bool, causal: bool) -> None:
    theirs = torch_layer(
        kind, norm_first=norm_first, activation=activation, bias=bias, batch_first=batch_first, layer_norm_eps=1e-3
    )
    ours = from_torch(theirs, apply_causal_mask=causal)
    assert type(ours) is (DecoderBlock if kind == "decoder" else EncoderBlock)
    call = Call(kind, causal)
    call.compare(ours, theirs)
    with torch.no_grad():  # Where torch has a fast path, it is taken now.
        call.compare(ours, theirs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_stacks(kind: str, norm_first: bool, norm: bool, causal: bool) -> None:
    theirs = torch_stack(kind, nn.LayerNorm(EMBED_DIM) if norm else None, norm_first=norm_first)
    ours = from_torch(theirs, apply_causal_mask=causal)
    assert type(ours) is BlockStack
    Call(kind, causal).compare(ours, theirs)


@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_causal_decoder_token_by_token(norm_first: bool) -> None:
    theirs = torch_stack("decoder", nn.LayerNorm(EMBED_DIM), norm_first=norm_first)
    ours = from_torch(theirs, apply_causal_mask=True, use_kv_cache=True)
    call = Call("decoder", causal=True)
    whole = call.theirs(theirs)
    for new in range(LENGTH):
        mask = call.real[:, new : new + 1]
        out = ours(call.x[:, new : new + 1], call.source, attention_mask=mask, source_mask=call.source_real)
        close(out[mask], whole[:, new : new + 1][mask])
    held = [[block.attention.kv_cache.cached_length, block.cross_attention.kv_cache is None] for block in ours.blocks]
    assert held == [[LENGTH, False]] * 3


def test_gradients_of_all_parameters() -> None:
    theirs = torch_layer("decoder", norm_first=True)
    ours, call = from_torch(theirs, apply_causal_mask=True), Call("decoder", causal=True)
    call.theirs(theirs)[call.real].square().sum().backward()
    call.ours(ours)[call.real].square().sum().backward()
    expected = {
        f"{own}.{part}": parameter.grad
        for own, other in DECODER_NAMES.items()
        for part, parameter in theirs.get_submodule(other).named_parameters()
    }
    for own, other in (("attention", theirs.self_attn), ("cross_attention", theirs.multihead_attn)):
        for part in ("weight", "bias"):
            thirds = getattr(other, f"in_proj_{part}").grad.chunk(3)
            expected |= {f"{own}.{name}.{part}": third for name, third in zip(IN_PROJECTIONS, thirds, strict=True)}
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name], atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_in_the_same_places(kind: str, norm_first: bool) -> None:
    """Equal random numbers drop equal things; of one row, as torch stores rows otherwise, and none within attention."""
    theirs = torch_layer(kind, norm_first=norm_first, dropout=0.4).train()
    for module in theirs.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    theirs.dropout.p = 0.2
    ours, call = from_torch(theirs), Call(kind, causal=False)
    for name in ("x", "source", "real", "source_real"):
        setattr(call, name, getattr(call, name)[:1])
    call.real[:] = True
    torch.manual_seed(1)
    out = call.ours(ours)
    torch.manual_seed(1)
    close(out, call.theirs(theirs))
    attention = from_torch(torch_layer(kind, dropout=0.4)).attention
    assert (attention.dropout, attention.training) == (0.4, False)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_shares_nothing_and_changes_nothing(kind: str, stacked: bool) -> None:
    # An activation with a weight: within a decoder, torch's copies of the layer have lost it to F.relu.
    options = {"norm_first": True, "activation": nn.PReLU(dtype=torch.float64)}
    theirs = torch_stack(kind, nn.LayerNorm(EMBED_DIM), **options) if stacked else torch_layer(kind, **options)
    before, call = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}, Call(kind, causal=False)
    expected = call.theirs(theirs)
    ours = from_torch(theirs)
    call.compare(ours, theirs)
    assert {id(module) for module in ours.modules()}.isdisjoint(id(module) for module in theirs.modules())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    after = theirs.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert torch.equal(call.theirs(theirs), expected)


@pytest.mark.parametrize("training", [False, True])
def test_training_mode_and_frozen_weights_go_along(training: bool) -> None:
    theirs = torch_stack("decoder", nn.LayerNorm(EMBED_DIM)).train(training)
    theirs.layers[1].requires_grad_(False)
    ours = from_torch(theirs)
    assert {module.training for module in ours.modules()} == {training}
    assert [{p.requires_grad for p in block.parameters()} for block in ours.blocks] == [{True}, {False}, {True}]


@pytest.mark.parametrize(
    "module",
    [nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Transformer(4, 2, 1, 1, 8, batch_first=True), nn.GRU(4, 4)],
)
def test_refuses_another_kind(module: nn.Module) -> None:
    with pytest.raises(ArgumentError, match=f"^module: .* got {type(module).__name__}"):
        from_torch(module)


class Doubled(nn.TransformerEncoderLayer):
    def forward(self, *arguments: object, **options: object) -> Tensor:
        return 2 * super().forward(*arguments, **options)


def test_what_was_added_to_a_layer_is_not_lost_in_silence() -> None:
    hooked, uneven = (nn.TransformerEncoderLayer(16, 4, 32) for _ in range(2))
    hooked.register_forward_hook(lambda *_: None)
    uneven.dropout2.p = 0.5
    for layer, complaint in ((Doubled(16, 4, 32), "Doubled"), (hooked, "hooks"), (uneven, "same dropout")):
        for module in (layer, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)):
            with pytest.raises(ArgumentError, match=f"^module: .*{complaint}"):
                from_torch(module)
