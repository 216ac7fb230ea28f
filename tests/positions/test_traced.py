"""Positions in traced calls: the numbers of eager calls, and nothing is kept of traced tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.internals import constants, keeps_no_table
from tests.positions.scalings import CASES
from transformer.errors import ArgumentError, DtypeError
from transformer.positions import (
    ALiBi,
    LearnedPositions,
    RelativePositionBias,
    RotaryEmbedding,
    ScoreBias,
    SinusoidalPositions,
)
from transformer.positions.angles import Angles
from transformer.positions.scaling import plain_frequencies

FAR = 4_000_000


class Turned(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.rotary = RotaryEmbedding(16, **options)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        heads = x.unsqueeze(1)
        return self.rotary.rotate(heads, self.rotary.table(at, heads))


class Biased(nn.Module):
    def __init__(self, scheme: nn.Module) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        return self.scheme.bias(at.unsqueeze(-1) - at) + x.sum(-1)[:, None, None, :]


class Added(nn.Module):
    """Every second row begins with two tokens of padding."""

    def __init__(self, scheme: nn.Module) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, x: Tensor) -> Tensor:
        return self.scheme(x, step_at(x))


@dataclass
class TracedStep:
    """What a traced step knows: what it does not is not there to be asked for."""

    batch: int
    tokens: int
    device: torch.device
    at: Tensor
    token_positions: Tensor
    position_ids: None = None


def step_at(x: Tensor) -> TracedStep:
    at = torch.arange(x.shape[1], device=x.device) - 2 * (torch.arange(x.shape[0], device=x.device) % 2).unsqueeze(1)
    return TracedStep(x.shape[0], x.shape[1], x.device, at, at)


SCALED = ("linear 2.5", "dynamic far", "llama3", "yarn", "longrope above")
MODULES: dict[str, Callable[[], nn.Module]] = {
    "rotary": Turned,
    "rotary, interleaved part": lambda: Turned(rotary_dim=8, interleaved=True),
    "alibi": lambda: Biased(ALiBi(3)),
    "relative": lambda: Biased(RelativePositionBias(3)),
    "relative, both ways": lambda: Biased(RelativePositionBias(3, bidirectional=True)),
    "learned": lambda: Added(LearnedPositions(64, 16)),
    "sinusoidal": lambda: Added(SinusoidalPositions(16)),
    **{f"rotary, {name}": lambda name=name: Turned(scaling=CASES[name].ours(16)) for name in SCALED},
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]()


def tokens(length: int = 5, rows: int = 2, device: str = "cpu") -> Tensor:
    return torch.randn(rows, length, 16, device=device)


def is_untouched(module: nn.Module) -> bool:
    """Whether nothing of a traced call is kept: neither fake tensors nor blocks of a table."""
    kept = [copy for copies in constants(module) for copy in copies]
    return (
        all(type(tensor) is Tensor and not isinstance(tensor, FakeTensor) and tensor.is_cpu for tensor in kept)
        and keeps_no_table(module)
        and not any(isinstance(parameter, FakeTensor) for parameter in module.parameters())
    )


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


# --- angles without float64 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1.5, 0.01])
def test_angles_in_whole_numbers(base: float) -> None:
    """Also of pairs that turn more than once per position, and of padding."""
    angles = Angles(lambda: plain_frequencies(base, 64))
    near, far = torch.arange(-1, 2999), torch.arange(FAR - 1000, FAR + 1000)
    positions = torch.cat((near, far)).view(5, -1)
    exact = angles.exact(positions)
    angle = angles.within_half_a_turn(positions)
    assert angle.dtype == torch.float32
    assert float(angle.abs().max()) <= math.pi + 1e-6
    off = torch.remainder(angle.double() - exact + math.pi, 2 * math.pi) - math.pi
    assert float(off.abs().max()) < 1e-6
    torch.testing.assert_close(angle.cos().double(), exact.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(angle.sin().double(), exact.sin(), rtol=0, atol=1e-6)


def test_frequencies_as_close_to_a_whole_turn_as_can_be() -> None:
    """Rounded up they are no turn at all; the largest positions overflow nothing."""
    frequencies = [math.nextafter(2 * math.pi, 0.0), 2 * math.pi, 2.0**-60, 1.0]
    angles = Angles(lambda: torch.tensor(frequencies, dtype=torch.float64))
    positions = [0, 1, 2**31 - 1]
    turns = [[float(p * Fraction(f) / Fraction(2 * math.pi) % 1) for f in frequencies] for p in positions]
    off = angles.within_half_a_turn(torch.tensor(positions)).double() / (2 * math.pi) - torch.tensor(
        turns, dtype=torch.float64
    )
    off = (off + 0.5) % 1.0 - 0.5
    assert float(off.abs().max()) < 2e-7


def test_only_turns_are_on_other_devices() -> None:
    """Whole numbers: not every device has float64."""
    rotary, meta = RotaryEmbedding(16), torch.empty(0, device="meta")
    table = rotary.table(torch.arange(4, device="meta").unsqueeze(0), meta)
    assert (table.cos.dtype, table.cos.device.type) == (torch.float32, "meta")
    assert [len(copies) for copies in constants(rotary)] == [1, 2]
    assert table.cos.shape == rotary.table(torch.arange(4).unsqueeze(0)).cos.shape
    assert rotary.table(range(4), meta).cos.shape == rotary.table(range(4)).cos.shape


# --- every way of tracing --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_in_one_graph_for_every_length(module: nn.Module) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 6, 30, 61):
        x = tokens(length)
        close(compiled(x), module(x))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_every_batch_and_length(module: nn.Module, strict: bool) -> None:
    shape = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("L", max=64)}
    exported = torch.export.export(module, (tokens(),), dynamic_shapes=(shape,), strict=strict)
    assert is_untouched(module)
    for length, rows in ((9, 3), (64, 1)):
        x = tokens(length, rows)
        close(exported.module()(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary", "alibi", "relative", "learned", "sinusoidal"])
def test_exported_to_onnx(name: str) -> None:
    module = MODULES[name]()
    shape = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("L", max=64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(module, (tokens(),), dynamic_shapes=(shape,), dynamo=True, verbose=False)
    assert program is not None
    x = tokens(9, 3)
    close(program(x)[0], module(x))


def test_gradients_of_each_sample(module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    x = torch.randn(3, 2, 5, 16)

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().mean()

    gradients, by_x = torch.func.vmap(torch.func.grad(total, (0, 1)), (None, 0))(parameters, x)
    assert is_untouched(module)
    for sample in range(3):
        own = x[sample].clone().requires_grad_()
        *expected, its = torch.autograd.grad(total(parameters, own), [*parameters.values(), own])
        close(by_x[sample], its)
        for gradient, wanted in zip(gradients.values(), expected, strict=True):
            close(gradient[sample], wanted)


def test_built_and_run_under_fake_tensors(module: nn.Module, request: pytest.FixtureRequest) -> None:
    expected = module(tokens()).shape
    with FakeTensorMode():
        within = MODULES[request.node.callspec.params["module"]]()
        x = tokens().requires_grad_()
        out = within(x)
        out.sum().backward()
    assert isinstance(out, FakeTensor)
    assert tuple(out.shape) == tuple(expected)
    for copies in constants(within):
        assert not any(isinstance(copy, FakeTensor) for copy in copies)
        copies[0].tolist()


def test_built_outside_and_run_under_fake_tensors(module: nn.Module) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = module(tokens())
    assert isinstance(out, FakeTensor)
    assert is_untouched(module)
    assert module(tokens()).shape == out.shape


@pytest.mark.parametrize(
    "context", [lambda: torch.device("meta"), lambda: init_empty_weights(include_buffers=True)], ids=["meta", "empty"]
)
def test_built_without_numbers(context: Callable, request: pytest.FixtureRequest, module: nn.Module) -> None:
    """Positions have their numbers all the same: weights alone are to be loaded."""
    with context():
        empty = MODULES[request.node.callspec.params["module"]]()
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.to("meta")(tokens(device="meta")).shape == module(tokens()).shape
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    x = tokens()
    assert torch.equal(empty(x), module(x))


def test_traced_by_jit(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(module, (tokens(),))
    assert is_untouched(module)
    x = tokens()
    close(traced(x), module(x))


# --- absolute positions and their step ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_padding_gets_nothing(name: str) -> None:
    module, x = MODULES[name]().scheme, torch.randn(2, 5, 16)
    out = module(x, step_at(x))
    assert torch.equal(out[1, :2], x[1, :2])
    # The second row stands two positions earlier.
    close(out[1, 2:] - x[1, 2:], out[0, :3] - x[0, :3])


def test_of_a_traced_call_the_length_alone_is_looked_at() -> None:
    module = LearnedPositions(4, 16)
    with pytest.raises(ArgumentError, match="max_length: expected at most 4 tokens, got 5"):
        module(tokens(5), step_at(tokens(5)))
    module(tokens(4), step_at(tokens(4)))


def test_an_embedding_that_is_more_than_its_weight_knows_its_own_dtype() -> None:
    """As under a policy of mixed precision: 16-bit vectors from a module that holds others."""
    module, x = LearnedPositions(8, 16), tokens().bfloat16()
    with pytest.raises(DtypeError, match="as the module's weights"):
        module(x, step_at(x))
    module.embedding.register_forward_hook(lambda _module, _inputs, out: out.bfloat16())
    assert module(x, step_at(x)).dtype == torch.bfloat16


def test_only_schemes_without_weights_are_fixed() -> None:
    assert not ALiBi(2).learned
    assert RelativePositionBias(2).learned
    assert ScoreBias.learned, "one that says nothing may learn"


@pytest.mark.parametrize("make", [lambda: LearnedPositions(8, 16), lambda: RelativePositionBias(3)])
def test_weights_are_drawn_anew_as_at_first(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(5)
    expected, module = make().embedding.weight, make()
    torch.manual_seed(5)
    module.reset_parameters()
    assert torch.equal(module.embedding.weight, expected)
