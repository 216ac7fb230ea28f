"""Function transforms, fake tensors and traces: a traced call gives the results of an eager call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from tests.integration.builders import (
    ATTENTIONS,
    DECODERS,
    decoder,
    encoder,
    encoder_decoder,
    padding,
    reachable_tensors,
    token_ids,
    vectors,
)
from transformer import GroupQueryAttention, MultiHeadAttention

MODELS: dict[str, Callable[[], nn.Module]] = {
    "decoder": lambda: decoder(attention="gqa", num_groups=2, qk_norm=True),
    "decoder of 512": lambda: decoder(d_model=512),
    "alibi, window and sinks": lambda: decoder(position="alibi", window_size=3, num_sinks=1),
    "relative": lambda: decoder(position="relative"),
    "learned": lambda: decoder(position="learned", max_length=64, softcap=5.0),
    "encoder": lambda: encoder(norm="layer"),
    "encoder decoder": encoder_decoder,
}


def inputs_of(model: nn.Module, batch: int, length: int, where: str | None) -> tuple[Tensor, ...]:
    """Ids, then masks where there are any."""
    masks = () if where is None else (padding(where, batch, length),)
    if type(model).__name__ == "EncoderDecoderTransformer":
        return token_ids(batch, length), token_ids(batch, length, seed=1), *masks, *masks
    return token_ids(batch, length), *masks


# PyTorch says so where it runs one of its operations row by row.
ROW_BY_ROW = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@ROW_BY_ROW
@pytest.mark.slow
@pytest.mark.parametrize("where", [None, "left", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_each_sample(name: str, where: str | None) -> None:
    """vmap over samples, each with a mask of its own, equals one backward for each of them."""
    model = MODELS[name]()
    parameters = dict(model.named_parameters())
    inputs = inputs_of(model, 3, 6, where)

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        out = functional_call(model, parameters, tuple(each.unsqueeze(0) for each in sample))
        size = out.square().mean(-1)
        # A mean over real tokens, without asking how many there are.
        return size.mean() if where is None else size.where(sample[-1].unsqueeze(0), 0.0).sum() / sample[-1].sum()

    together = vmap(grad(loss), in_dims=(None, *[0] * len(inputs)), randomness="different")(
        {key: value.detach() for key, value in parameters.items()}, *inputs
    )
    for row in range(3):
        alone = torch.autograd.grad(loss(parameters, *(each[row] for each in inputs)), list(parameters.values()))
        for key, gradient in zip(parameters, alone, strict=True):
            assert_close(together[key][row], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@ROW_BY_ROW
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_vmap_over_a_module(kind: str) -> None:
    module, x = ATTENTIONS[kind](), vectors(6, 5).unflatten(0, (3, 2))
    real = padding("left", 6, 5).unflatten(0, (3, 2))
    assert_close(vmap(module)(x), torch.stack([module(each) for each in x]), atol=1e-5, rtol=0)
    out = vmap(lambda x, real: module(x, attention_mask=real))(x, real)
    expected = torch.stack([module(each, attention_mask=mask) for each, mask in zip(x, real, strict=True)])
    assert_close(out[real], expected[real], atol=1e-5, rtol=0)
    assert (out[~real] == 0).all()


@pytest.mark.parametrize("kind", ["rotary gqa", "window sinks alibi", "relative", "softcap"])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_mode(kind: str, masked: bool) -> None:
    """The directional derivative is the reverse mode's."""
    module, x, direction = ATTENTIONS[kind]().double(), vectors(3, 5).double(), vectors(3, 5, seed=1).double()
    real = padding("both", 3, 5)

    def call(x: Tensor) -> Tensor:
        return module(x, attention_mask=real)[real] if masked else module(x)

    with sdpa_kernel(SDPBackend.MATH):
        out, tangent = jvp(call, (x,), (direction,))
        again, pullback = vjp(call, x)
        assert_close(out, again)
        weight = torch.randn_like(out)
        assert_close((tangent * weight).sum(), (pullback(weight)[0] * direction).sum())


def test_a_second_derivative() -> None:
    module, x = GroupQueryAttention(8, 2, 1, True).double(), vectors(1, 3, 8).double()
    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.func.hessian(lambda x: module(x).square().sum())(x)
    assert_close(hessian.reshape(24, 24), hessian.reshape(24, 24).T)
    assert hessian.abs().max() > 0.1


# --- tensors without numbers ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("where", [None, "both"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_made_and_called_without_numbers(name: str, where: str | None) -> None:
    expected = MODELS[name]()(*inputs_of(MODELS[name](), 3, 6, where))
    with FakeTensorMode():
        model = MODELS[name]()
        # Masks are made of numbers: here they are of the right shape, which is all that may count.
        fakes = [torch.empty(each.shape, dtype=each.dtype) for each in inputs_of_shape(model, where)]
        out = model(*fakes)
    assert (type(out), out.shape, out.dtype) == (FakeTensor, expected.shape, expected.dtype)


def inputs_of_shape(model: nn.Module, where: str | None) -> list[Tensor]:
    ids, mask = torch.empty(3, 6, dtype=torch.int64), torch.empty(3, 6, dtype=torch.bool)
    pairs = 2 if type(model).__name__ == "EncoderDecoderTransformer" else 1
    return [ids] * pairs + ([] if where is None else [mask] * pairs)


@pytest.mark.slow
@pytest.mark.parametrize("where", [None, "both"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_numbers_that_is_called_without_is_untouched(name: str, where: str | None) -> None:
    model, inputs = MODELS[name](), inputs_of(MODELS[name](), 3, 6, where)
    tensors = {path: id(tensor) for path, tensor in reachable_tensors(model)}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(*[mode.from_tensor(each) for each in inputs]).shape[:2] == (3, 6)
    after = dict(reachable_tensors(model))
    assert not [path for path, tensor in after.items() if isinstance(tensor, FakeTensor)]
    assert {path: id(after[path]) for path in tensors} == tensors
    assert torch.equal(model(*inputs), MODELS[name]()(*inputs))


@pytest.mark.parametrize("where", [None, "both"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_the_meta_device(name: str, where: str | None) -> None:
    expected, model = MODELS[name](), MODELS[name]().to("meta")
    inputs = inputs_of(model, 3, 6, where)
    out = model(*[each.to("meta") for each in inputs])
    assert (out.device.type, out.shape) == ("meta", expected(*inputs).shape)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_module_on_the_meta_device(kind: str) -> None:
    with torch.device("meta"):
        module, x, real = ATTENTIONS[kind](), torch.empty(3, 5, 32), torch.empty(3, 5, dtype=torch.bool)
        kv = torch.empty(3, 4, 32)
    out, weights = module(x, attention_mask=real, return_weights=True)
    assert (out.shape, weights.shape, out.device.type) == ((3, 5, 32), (3, 4, 5, 5), "meta")
    if not module.apply_causal_mask:
        assert module(x, kv, kv_mask=real[:, :4]).shape == (3, 5, 32)


# --- traces -----------------------------------------------------------------------------------------------------------

# A trace warns of numbers that it takes to be constant, and of its age.
TRACES = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")


@pytest.mark.slow
@TRACES
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_jit_trace_of_a_module(kind: str) -> None:
    """Of one shape, as of `nn.MultiheadAttention`; values are not what is traced, those of a mask neither."""
    module = ATTENTIONS[kind]().eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, (vectors(3, 6, seed=5),), check_trace=False)
        assert_close(traced(vectors(3, 6)), module(vectors(3, 6)), atol=1e-5, rtol=0)
        masked = Masked(module)
        traced = torch.jit.trace(masked, (vectors(3, 6), padding("left", 3, 6)), check_trace=False)
        x, real = vectors(3, 6, seed=1), padding("both", 3, 6)
        out, expected = traced(x, real), masked(x, real)
    assert_close(out[real], expected[real], atol=1e-5, rtol=0)
    assert (out[~real] == 0).all()


class Masked(nn.Module):
    """A module with its mask by position: a trace knows no other arguments."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.module(x, attention_mask=attention_mask)


@TRACES
@pytest.mark.parametrize(
    "module", [nn.MultiheadAttention(32, 4, batch_first=True), MultiHeadAttention(32, 4)], ids=type
)
def test_a_jit_trace_of_cross_attention(module: nn.Module) -> None:
    """Ours, and the one whose habit it is."""
    x, kv = vectors(2, 3), vectors(2, 5, seed=1)
    arguments = (x, kv, kv) if isinstance(module, nn.MultiheadAttention) else (x, kv)
    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), tuple(each + 1 for each in arguments), check_trace=False)
        # The other one gives a tuple of outputs and weights.
        assert_close(traced(*arguments), module(*arguments), atol=1e-5, rtol=0)


@pytest.mark.slow
@TRACES
@pytest.mark.parametrize("where", [None, "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_jit_trace_of_a_model(name: str, where: str | None) -> None:
    model = MODELS[name]()
    inputs = inputs_of(model, 3, 6, where)
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs, check_trace=False)
        others = tuple(each.flip(0) for each in inputs)
        out, expected = traced(*others), model(*others)
    real = torch.ones(3, 6, dtype=torch.bool) if where is None else others[-1]
    assert_close(out[real], expected[real], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("where", [None, "left"])
@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS.keys())
def test_make_fx(options: dict, where: str | None) -> None:
    """A graph of operations alone, good for other ids and other masks of that shape."""
    model = decoder(**options)
    inputs = inputs_of(model, 3, 6, where)
    with torch.no_grad():
        graph = make_fx(lambda *inputs: model(*inputs), tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        others = tuple(each.flip(0) for each in inputs)
        out, expected = graph(*others), model(*others)
    real = torch.ones(3, 6, dtype=torch.bool) if where is None else others[-1]
    assert_close(out[real], expected[real], atol=1e-5, rtol=0)
