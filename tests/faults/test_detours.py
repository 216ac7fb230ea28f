"""`.to()`, `.half()`, `deepcopy` and `pickle` with a live cache between two steps, without effect on the next step."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens

KINDS = {"expanding": {}, "sliding": {"window_size": 3}, "sinks": {"window_size": 3, "num_sinks": 2}}
STEPS = ((4, None), (1, None), (3, ((0, 3), (1, 1))), (5, None), (1, ((0, 1), (0, 0))), (1, None))


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def handed_over(module: nn.Module) -> nn.Module:
    """The cache in a new module of the same weights."""
    other = copy.deepcopy(module)
    other.kv_cache = None
    other.kv_cache, module.kv_cache = module.kv_cache, None
    return other


def moved_cache(module: nn.Module) -> nn.Module:
    if module.kv_cache is not None:
        module.kv_cache.to(dtype=torch.float64).to("cpu", torch.float32)
    return module


DETOURS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copied cache": lambda module: handed_over(copy.deepcopy(module)),
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
    "to cpu": lambda module: module.to("cpu").cpu(),
    "to float64 and back": lambda module: module.to(torch.float64).to(torch.float32),
    "double and float": lambda module: module.double().float(),
    "to like": lambda module: module.to(torch.zeros(1, dtype=torch.float64)).to(dtype=torch.float32),
    "inside a model": lambda module: nn.Sequential(module).double().float()[0],
    "cache there and back": moved_cache,
    "handed over": handed_over,
    "train and eval": lambda module: module.train().eval(),
    "nothing": lambda module: module,
}


def conversation(module: nn.Module, detours: list[str], recorded: bool = False) -> list[Tensor]:
    """The outputs of the steps, with a detour after each; one of three calls is cross-attention."""
    outputs = []
    for step, ((length, spans), name) in enumerate(zip(STEPS, detours, strict=True)):
        x = tokens(2, length, 16, seed=step, dtype=torch.float32)
        mask = None if spans is None else padding(list(spans), length)
        with torch.set_grad_enabled(recorded):
            outputs.append(module(x, attention_mask=mask))
            if not module.apply_causal_mask:
                outputs.append(module(x, tokens(2, 4, 16, seed=9, dtype=torch.float32)))
        module = DETOURS[name](module)
    return outputs


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "with a source"])
@pytest.mark.parametrize("name", DETOURS)
def test_a_detour_between_any_two_steps(name: str, causal: bool) -> None:
    for kind in KINDS.values():
        options = Options(num_groups=2, causal=causal, scheme=SCHEMES["rotary halves"], qk_norm=True, **kind)
        straight = conversation(build(options, dtype=torch.float32), ["nothing"] * len(STEPS))
        around = conversation(build(options, dtype=torch.float32), [name] * len(STEPS))
        assert_same(around, straight, atol=1e-6)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(sorted(DETOURS)), min_size=len(STEPS), max_size=len(STEPS)),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["none", "rotary halves", "alibi", "t5 causal"]),
    st.booleans(),
)
def test_any_detours(detours: list[str], kind: str, scheme: str, recorded: bool) -> None:
    options = Options(num_groups=2, scheme=SCHEMES[scheme], **KINDS[kind])
    straight = conversation(build(options, dtype=torch.float32), ["nothing"] * len(STEPS), recorded)
    around = conversation(build(options, dtype=torch.float32), detours, recorded)
    assert_same(around, straight, atol=1e-6)


@pytest.mark.parametrize("name", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_conversation_in_another_dtype(kind: str, name: str) -> None:
    """`.half()` converts the cache; the next steps are those without the conversion, up to rounding."""
    options = Options(scheme=SCHEMES["rotary halves"], **KINDS[kind])
    straight, module = (build(options, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for step, (length, spans) in enumerate(STEPS):
            x = tokens(2, length, 16, seed=step, dtype=torch.float32)
            mask = None if spans is None else padding(list(spans), length)
            if step == 3:
                assert getattr(module, name)() is module
                assert module.kv_cache["key"].dtype == module.q_proj.weight.dtype
                assert module.kv_cache.lengths.tolist() == straight.kv_cache.lengths.tolist()
            dtype = module.q_proj.weight.dtype
            out = module(x.to(dtype), attention_mask=mask)
            assert out.dtype == dtype
            tolerance = {"half": 2e-2, "bfloat16": 2e-1, "double": 1e-5}[name] if step >= 3 else 0
            assert_same(out.float(), straight(x, attention_mask=mask), atol=tolerance)
