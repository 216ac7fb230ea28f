"""Modules that cannot be converted: refused with their path in the model, without changes."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from transformer import GroupQueryAttention, MultiHeadAttention
from transformer.attention import from_torch, to_gqa, to_mha, to_mqa, to_torch
from transformer.errors import ArgumentError, AttentionError, ConfigurationError
from transformer.positions import ALiBi

EMBED_DIM, HEADS = 24, 12

own = partial(MultiHeadAttention, EMBED_DIM, HEADS)
grouped = partial(GroupQueryAttention, EMBED_DIM, HEADS)
theirs = partial(nn.MultiheadAttention, EMBED_DIM, HEADS)
Change = Callable[[nn.Module], object]


class OwnExtended(MultiHeadAttention):
    pass


class TorchExtended(nn.MultiheadAttention):
    pass


class LinearExtended(nn.Linear):
    pass


class ParameterExtended(nn.Parameter):
    pass


def sets(name: str, value: Callable[[nn.Module], object]) -> Change:
    path, _, attribute = name.rpartition(".")
    return lambda module: setattr(module.get_submodule(path), attribute, value(module))


def hooks(name: str = "", kind: str = "forward") -> Change:
    return lambda module: getattr(module.get_submodule(name), f"register_{kind}_hook")(print)


def freezes(name: str) -> Change:
    return lambda module: module.get_parameter(name).requires_grad_(False)


def as_it_is(module: nn.Module) -> None:
    pass


def linear(kind: type[nn.Linear] = nn.Linear, **options: object) -> Callable[[nn.Module], nn.Module]:
    return lambda _: kind(EMBED_DIM, EMBED_DIM, **options)


def wrapped(_: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(EMBED_DIM, EMBED_DIM))


# What is built, what is done to it, and what the message says after the path of the attention, "middle".
OURS = {
    "wrapper": (own, sets("k_proj", wrapped), r"^middle\.k_proj: .*plain nn\.Linear.*got Sequential"),
    "subclass": (own, sets("v_proj", linear(LinearExtended)), r"^middle\.v_proj: .*got LinearExtended"),
    "parametrization": (
        own,
        lambda module: parametrizations.weight_norm(module.v_proj),
        r"^middle\.v_proj: .*got ParametrizedLinear",
    ),
    "hook of a projection": (own, hooks("k_proj"), r"^middle\.k_proj: .*without hooks"),
    "backward hook of a projection": (own, hooks("k_proj", "full_backward"), r"^middle\.k_proj: .*without hooks"),
    "forward of a projection": (own, sets("k_proj.forward", lambda _: print), r"^middle\.k_proj: .*plain"),
    "more parameters": (
        own,
        lambda module: module.k_proj.register_parameter("more", nn.Parameter(torch.zeros(1))),
        r"^middle\.k_proj: .*plain",
    ),
    "a module inside": (
        own,
        lambda module: module.k_proj.register_module("adapter", nn.Linear(2, 2)),
        r"^middle\.k_proj: .*plain",
    ),
    "weight of a class of its own": (
        own,
        sets("k_proj.weight", lambda module: ParameterExtended(module.k_proj.weight)),
        r"^middle\.k_proj: .*plain",
    ),
    "hook": (own, hooks(), r"^middle: .*without hooks"),
    "backward hook": (own, hooks("", "full_backward"), r"^middle: .*without hooks"),
    "hook before": (own, hooks("", "forward_pre"), r"^middle: .*without hooks"),
    "hook before backward": (own, hooks("", "full_backward_pre"), r"^middle: .*without hooks"),
    "class": (partial(OwnExtended, EMBED_DIM, HEADS), as_it_is, r"^middle: .*got OwnExtended"),
    "tied to q_proj": (own, sets("k_proj.weight", lambda m: m.q_proj.weight), r"^middle\.q_proj\.weight: .*k_proj"),
    "one with q_proj": (own, sets("k_proj", lambda m: m.q_proj), r"^middle\.q_proj\.(weight|bias): .*k_proj"),
}
TO_TORCH = {
    **{name: row for name, row in OURS.items() if not name.startswith(("tied", "one"))},
    "wrapped query": (own, sets("q_proj", wrapped), r"^middle\.q_proj: .*plain"),
    "wrapped output": (own, sets("out_proj", wrapped), r"^middle\.out_proj: .*plain"),
    "position": (partial(own, position=ALiBi(HEADS)), as_it_is, r"^middle: .*position=ALiBi"),
    "window_size": (partial(own, window_size=2), as_it_is, r"^middle: .*window_size=2"),
    "qk_norm": (partial(own, qk_norm=nn.RMSNorm), as_it_is, r"^middle: .*qk_norm=RMSNorm"),
    "k_norm alone": (partial(own, qk_norm=nn.RMSNorm), sets("q_norm", lambda _: None), r"^middle: .*qk_norm=RMSNorm"),
    "softcap": (partial(own, softcap=2.0), as_it_is, r"^middle: .*softcap=2\.0"),
    "scale": (partial(own, scale=0.3), as_it_is, r"^middle: .*scale=0\.3"),
    "head_dim": (partial(own, head_dim=5), as_it_is, r"^middle: .*num_heads \* head_dim = 60 other than embed_dim=24"),
    "out_bias": (partial(own, out_bias=False), as_it_is, r"^middle: .*out_bias"),
    "bias": (partial(own, bias=False, out_bias=True), as_it_is, r"^middle: .*out_bias"),
    "one without bias": (own, sets("k_proj", linear(bias=False)), r"^middle: .*biases in some projections only"),
    "all": (partial(own, window_size=2, softcap=2.0, scale=0.3), as_it_is, r"window_size=2, softcap=2\.0, scale=0\.3"),
    "dtypes": (own, lambda module: module.k_proj.half(), r"^middle: .*q_proj\.weight.*alike in dtype"),
    "frozen weight": (own, freezes("v_proj.weight"), r"^middle: .*v_proj\.weight alike"),
    "frozen bias": (partial(own, kv_dim=7), freezes("q_proj.bias"), r"^middle: .*v_proj\.bias alike"),
    "tied": (
        own,
        sets("k_proj.weight", lambda m: m.v_proj.weight),
        r"^middle\.v_proj\.weight: .*middle\.k_proj\.weight",
    ),
}
FROM_TORCH = {
    "kdim": (partial(theirs, kdim=5), as_it_is, r"^middle: .*kdim=5 other than vdim=24"),
    "vdim": (partial(theirs, vdim=5), as_it_is, r"^middle: .*kdim=24 other than vdim=5"),
    "add_bias_kv": (partial(theirs, add_bias_kv=True), as_it_is, r"^middle: .*add_bias_kv"),
    "add_zero_attn": (partial(theirs, add_zero_attn=True), as_it_is, r"^middle: .*add_zero_attn"),
    "dropout": (partial(theirs, dropout=1.0), as_it_is, r"^middle: .*dropout=1\.0"),
    "hook": (theirs, hooks(), r"^middle: .*without hooks"),
    "hook of the output": (theirs, hooks("out_proj"), r"^middle\.out_proj: .*without hooks"),
    "class": (partial(TorchExtended, EMBED_DIM, HEADS), as_it_is, r"^middle: .*got TorchExtended"),
    "parametrization": (
        theirs,
        lambda module: parametrizations.weight_norm(module, "in_proj_weight"),
        r"^middle: .*got ParametrizedMultiheadAttention",
    ),
    "tied": (
        theirs,
        lambda module: module.register_parameter("again", module.in_proj_weight),
        r"^middle\.again: .*middle\.in_proj_weight",
    ),
}
GROUPS = {
    "neither divides": (partial(grouped, 4), 6, r"^num_groups: .*the 4 key/value heads of middle, got 6.*to_mha"),
    "no divisor of the heads": (partial(grouped, 4), 8, r"^num_groups: .*num_heads=12 of first, got 8"),
    "norm of all heads": (
        partial(grouped, 4, qk_norm=nn.RMSNorm, qk_norm_per_head=False),
        2,
        r"^middle: .*a norm of each key head, got one over all 4",
    ),
    "zero": (partial(grouped, 4), 0, r"^num_groups: .*at least 1, got 0"),
    "none": (partial(grouped, 4), None, r"^num_groups: .*at least 1, got None"),
    "no whole number": (partial(grouped, 4), 2.0, r"^num_groups: .*at least 1, got 2\.0"),
}
CASES = [
    *[pytest.param(to_mqa, *row, id=f"to_mqa {name}") for name, row in OURS.items()],
    *[pytest.param(to_torch, *row, id=f"to_torch {name}") for name, row in TO_TORCH.items()],
    *[pytest.param(from_torch, *row, id=f"from_torch {name}") for name, row in FROM_TORCH.items()],
    *[
        pytest.param(partial(to_gqa, num_groups=number), build, as_it_is, message, id=f"to_gqa {name}")
        for name, (build, number, message) in GROUPS.items()
    ],
]


@pytest.mark.parametrize(("convert", "build", "change", "message"), CASES)
def test_refused_by_its_place(convert: Change, build: Callable[[], nn.Module], change: Change, message: str) -> None:
    middle, fine = build(), theirs if convert is from_torch else own
    change(middle)
    model = nn.ModuleDict({"first": fine(), "middle": middle, "last": fine()})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ConfigurationError, match=message):
        convert(model)
    assert dict(model.named_modules()) == modules
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigurationError):
        convert(middle)


@pytest.mark.parametrize("convert", [to_mha, to_mqa, partial(to_gqa, num_groups=2), from_torch, to_torch])
def test_a_model_without_an_attention_to_convert(convert: Change) -> None:
    other = own() if convert is from_torch else theirs()
    for module in (nn.Linear(2, 2), nn.ModuleList([other])):
        with pytest.raises(ArgumentError, match=r"^module: expected a .*Attention, .*got (Linear|ModuleList) without"):
            convert(module)
    with pytest.raises(ArgumentError, match=r"^module: expected a torch\.nn\.Module, got str"):
        convert("model")


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_layers_of_torch_are_left_to_the_blocks(layer: type[nn.Module]) -> None:
    model = nn.ModuleDict({"layer": layer(EMBED_DIM, HEADS, 8, batch_first=True)})
    for module, place in ((model, "layer"), (model["layer"], "module")):
        with pytest.raises(ArgumentError, match=rf"nn\.{layer.__name__}.* at {place}; transformer\.blocks\.from_torch"):
            from_torch(module)


def test_weights_tied_across_heads_of_other_sizes() -> None:
    model = nn.ModuleList([own(head_dim=4), GroupQueryAttention(EMBED_DIM, 6, 6, head_dim=8)])
    model[1].k_proj.weight = model[0].k_proj.weight
    with pytest.raises(AttentionError, match=r"^1\.k_proj\.weight: .*0\.k_proj\.weight"):
        to_mqa(model)
