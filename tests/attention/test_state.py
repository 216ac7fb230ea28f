"""State of a module with a cache: copies and moves include the cache, state dicts do not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracle import Options
from tests.setups import SCHEMES, build, cached_lengths, padding, tokens
from transformer import GroupQueryAttention
from transformer.positions import RotaryEmbedding

LENGTHS = (4, 1, 3, 1)
SPANS = {4: [(0, 4), (1, 3)], 1: [(0, 1), (0, 1)], 3: [(0, 3), (0, 0)]}

DETOURS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "to and back": lambda module: module.to(torch.float64).to(torch.float32),
    "double and float": lambda module: module.double().float(),
    "cache to and back": lambda module: cache_there_and_back(module),
    "train and eval": lambda module: module.train().eval(),
    "state_dict": lambda module: with_weights(module, module.state_dict()),
    "reinstalled cache": lambda module: with_cache(module, module.kv_cache),
    "read": lambda module: with_cache(module, module.kv_cache) if list(module.kv_cache) else module,
    "reserve": lambda module: with_cache(module, module.kv_cache.reserve(100)),
}


def cache_there_and_back(module: nn.Module) -> nn.Module:
    module.kv_cache.to(dtype=torch.float64).to(dtype=torch.float32)
    return module


def with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(weights)
    return module


def with_cache(module: nn.Module, cache: object) -> nn.Module:
    module.kv_cache = None
    module.kv_cache = cache
    return module


def inputs(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    return [
        (tokens(2, length, 16, seed=step, dtype=dtype), padding(SPANS[length], length))
        for step, length in enumerate(LENGTHS)
    ]


@pytest.mark.slow
@settings(max_examples=80)
@given(
    st.sampled_from(sorted(DETOURS)),
    st.integers(1, len(LENGTHS) - 1),
    st.sampled_from(sorted(SCHEMES)),
    st.sampled_from((None, 3)),
    st.booleans(),
)
def test_a_detour_changes_nothing(name: str, before: int, scheme: str, window: int | None, grad: bool) -> None:
    """Issues: transformers#32681. A copied cache could not be used later."""
    options = Options(scheme=SCHEMES[scheme], window_size=window, num_groups=2, qk_norm=True)
    straight, module = (build(options, dtype=torch.float32) for _ in range(2))
    with torch.set_grad_enabled(grad):
        for step, (x, mask) in enumerate(inputs()):
            if step == before:
                module = DETOURS[name](module)
                assert cached_lengths(module) == cached_lengths(straight)
            expected = straight(x, attention_mask=mask)
            # Not bit for bit: a buffer of another size may take another path through a kernel.
            torch.testing.assert_close(module(x, attention_mask=mask), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 2e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)],
)
@pytest.mark.parametrize("before", range(1, len(LENGTHS)))
def test_the_conversation_goes_on_in_another_dtype(
    before: int, dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    """The cache and the rotary tables follow `.to(dtype)`; what was fed before is still there, at the same
    place."""
    options = Options(scheme=SCHEMES["rotary halves"], window_size=window)
    straight, module = build(options, dtype=torch.float32), build(options, dtype=torch.float32)
    with torch.no_grad():
        for step, (x, mask) in enumerate(inputs()):
            if step == before:
                module = module.half() if dtype == torch.float16 else module.to(dtype)
                assert module.kv_cache["key"].dtype == dtype
            expected = straight(x, attention_mask=mask)
            now = dtype if step >= before else torch.float32
            out = module(x.to(now), attention_mask=mask)
            assert out.dtype == now
            torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, DETOURS["pickle"]], ids=["deepcopy", "pickle"])
def test_a_copy_goes_its_own_way(copied: Callable[[nn.Module], nn.Module], grad: bool) -> None:
    """Issues: transformers#37078. A cache given away was changed by the one who got it. Copies are detached."""
    module, alone = build(Options(window_size=5)), build(Options(window_size=5))
    first = tokens(2, 4, 16).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        module(first), alone(first)
        other = copied(module)
        assert not other.kv_cache["key"].requires_grad
        assert module.kv_cache["key"].requires_grad == grad
        for step in range(3):
            other(tokens(2, 2, 16, seed=50 + step))
            x = tokens(2, 1, 16, seed=step)
            assert torch.equal(module(x), alone(x))
        assert cached_lengths(other) == [5, 5]
        assert other.kv_cache.length == 10


def test_no_cache_in_the_state_dict() -> None:
    module = build(Options())
    before = list(module.state_dict())
    module(tokens(1, 3, 16))
    assert list(module.state_dict()) == before
    assert not [name for name, _ in module.named_buffers() if "cache" in name]
    assert all(name.split(".")[0].endswith("_proj") for name in before)


def test_forgetting_equals_a_new_module() -> None:
    """Issues: transformers#48809. Reset kept the length. The inferred window is forgotten too."""
    for options in (Options(scheme=SCHEMES["rotary halves"]), Options(window_size=2, num_sinks=1)):
        module, fresh = build(options), build(options)
        module(tokens(3, 4, 16, seed=8), None, False)
        module.kv_cache = None
        for step, length in enumerate((2, 4, 1)):
            x = tokens(2, length, 16, seed=step)  # and of another batch size
            assert torch.equal(module(x, None, False), fresh(x, None, False))
        assert cached_lengths(module) == cached_lengths(fresh)


def test_print_shows_what_a_module_does() -> None:
    module = GroupQueryAttention(8, 4, 2, True, True, window_size=5, num_sinks=1, position=RotaryEmbedding(2))
    with torch.no_grad():
        module(torch.zeros(1, 3, 8))
    shown = repr(module)
    for part in ("num_heads=4", "num_groups=2", "apply_causal_mask=True", "window_size=5", "num_sinks=1"):
        assert part in shown
    assert "kv_cache=LayerCache(length=3, cached_length=3" in shown
    assert "(position): RotaryEmbedding(" in shown
    assert "window_size" not in repr(GroupQueryAttention(8, 4, 2)), "what a module does not have is not shown"
