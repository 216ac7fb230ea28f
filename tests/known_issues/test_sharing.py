"""Inputs and outputs: no memory is shared with the cache, and copies can be used in any order."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same, cache_snapshot
from tests.internals import buffers
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (2, 0), (2, 1)])
def test_inputs_and_outputs_never_alias_the_cache(window: int | None, sinks: int, mode: str) -> None:
    """Issues: transformers#37078. A cache given for reading was changed by its use. Everything that went in, and
    everything that came out, may be overwritten afterwards."""
    options = Options(window_size=window, num_sinks=sinks, scheme=SCHEMES["rotary halves"])
    module, alone = build(options), build(options)
    with MODES[mode]():
        for step, length in enumerate((1, 4, 1, 2)):
            x, mask = tokens(2, length, 16, seed=step), padding([(0, length), (0, 1)], length)
            bias = tokens(1, 1, length, 1, seed=step)
            expected = alone(x.clone(), attention_mask=mask.clone(), attn_bias=bias.clone(), return_weights=True)
            out, weights = module(x, attention_mask=mask, attn_bias=bias, return_weights=True)
            assert torch.equal(out, expected[0])
            with torch.no_grad():
                for tensor in (x, mask, bias, out.detach(), weights.detach()):
                    tensor.fill_(7)
            assert cache_snapshot(module) == cache_snapshot(alone)


@pytest.mark.parametrize("mode", MODES)
def test_identity_projections_do_not_make_the_cache_an_alias(mode: str) -> None:
    """Issues: transformers#37078. The same where a projection hands its input on, as a wrapper may."""
    module = build(Options(num_heads=2, num_groups=2, head_dim=8))
    module.k_proj, module.v_proj = nn.Identity(), nn.Identity()
    x = tokens(1, 3, 16)
    with MODES[mode]():
        module(x)
        before = cache_snapshot(module)
        x.zero_()
    assert cache_snapshot(module) == before


def test_a_stored_prompt_serves_many_times() -> None:
    """Issues: transformers#37078. A stored prompt grew with each use. Copies of one prompt's cache go on apart, and the
    stored one stays as it was."""
    module, prompt = build(Options(window_size=6)), tokens(1, 4, 16)
    with torch.no_grad():
        module(prompt)
        stored = copy.deepcopy(module.kv_cache)
        answers = []
        for _ in range(3):
            module.kv_cache = copy.deepcopy(stored)
            answers.append(torch.cat([module(tokens(1, 1, 16, seed=step)) for step in range(9)], dim=1))
            assert (stored.length, stored.cached_length) == (4, 4)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (3, 2)])
def test_copies_and_grad_modes_in_any_order(window: int | None, sinks: int, copied: str) -> None:
    """Issues: transformers#32681. Buffers of `deepcopy` or of `torch.inference_mode` could not be used later. The
    prompt in one mode, the copy in a second, the next calls in a third: all orders, and backward through the last."""
    options = Options(window_size=window, num_sinks=sinks, scheme=SCHEMES["rotary halves"])
    prompt, token = tokens(2, 4, 16), tokens(2, 2, 16, seed=1)
    straight = build(options)
    expected = [straight(prompt), straight(token)][1].detach()
    for first in MODES:
        for second in MODES:
            module = build(options)
            with MODES[first]():
                module(prompt)
            with MODES[second]():
                other = COPIES[copied](module)
            for third in MODES:
                again = COPIES[copied](other)
                with MODES[third]():
                    out = again(token)
                assert_same(out, expected)
                x = token.clone().requires_grad_()
                again(x).square().sum().backward()
                assert x.grad.any()


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (3, 2)])
def test_a_cache_moved_inside_inference_mode_can_be_used_later(window: int | None, sinks: int) -> None:
    """Issues: transformers#32681. The same for `.to`, which makes new tensors: moved in inference mode, used with
    gradients."""
    options = Options(window_size=window, num_sinks=sinks)
    module = build(options, dtype=torch.float32)
    with torch.inference_mode():
        module(tokens(1, 5, 16, dtype=torch.float32))
        cache = module.kv_cache.to(dtype=torch.float64)
    other = build(options)
    other.kv_cache = cache
    x = tokens(1, 1, 16).requires_grad_()
    other(x).square().sum().backward()
    assert x.grad.any()
    with torch.no_grad():
        assert other(tokens(1, 1, 16)).isfinite().all()


@pytest.mark.parametrize("order", [*permutations(MODES)], ids="-".join)
def test_inference_mode_before_and_after_anything(order: tuple[str, ...]) -> None:
    """Issues: transformers#32681. Self- and cross-attention of one module, in all orders of grad modes, twice over;
    what was made in inference mode is used outside of it."""
    options = Options(causal=False, window_size=3)
    module, plain = build(options), build(options, use_kv_cache=False)
    with torch.inference_mode():
        kept = tokens(2, 3, 16, seed=9)
    history: list[Tensor] = []
    for step, mode in enumerate(order * 2):
        with MODES[mode]():
            x = tokens(2, 2, 16, seed=step)
            history.append(x.clone())
            out = module(x)
            # A window of three shows each query its two predecessors: the last chunk and this one are enough.
            whole = plain(torch.cat(history[-2:], dim=1))[:, -2:]
            assert_same(out.detach(), whole.detach())
            source = kept if mode == "inference" else kept.clone() if mode == "no_grad" else tokens(2, 3, 16, seed=9)
            assert_same(module(x, source).detach(), plain(x, source).detach())
            assert all(not tensor.is_inference() for tensor in buffers(module.kv_cache))
