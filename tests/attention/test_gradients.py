"""Gradients through the cache: they reach earlier calls while they are recorded, and stop at `detach()`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens, without_cache


def gradients(module: nn.Module, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    out = torch.cat(outputs, dim=1)
    direction = tokens(*out.shape, seed=77)
    return list(torch.autograd.grad(out, [x, *module.parameters()], direction))


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(SCHEMES)),
    st.sampled_from((1, 2, 4)),
    st.sampled_from((None, 1, 3)),
    st.sampled_from((0, 2)),
    st.lists(st.integers(0, 10), max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_gradients_of_chunks_are_those_of_one_call(
    scheme: str,
    groups: int,
    window: int | None,
    sinks: int,
    cuts: list[int],
    padded: bool,
    softcap: bool,
) -> None:
    """Issues: transformers#43010 #28056, flash-linear-attention#73, torchtune with gradients. In-place writes broke
    backward."""
    options = Options(
        num_groups=groups,
        window_size=window,
        num_sinks=0 if window is None else sinks,
        scheme=SCHEMES[scheme],
        softcap=2.0 if softcap else None,
        qk_norm=True,
    )
    x = tokens(2, 10, 16).requires_grad_()
    mask = padding([(3, 7), (0, 8)], 10) if padded else None
    plain, module = build(without_cache(options)), build(options)
    expected = gradients(plain, x, [plain(x, attention_mask=mask)])
    edges = [0, *sorted(cuts), 10]
    outputs = [module(x[:, a:b], attention_mask=None if mask is None else mask[:, a:b]) for a, b in pairwise(edges)]
    for actual, wanted in zip(gradients(module, x, outputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("window", [None, 4])
def test_a_later_loss_reaches_earlier_inputs(window: int | None) -> None:
    module = build(Options(window_size=window))
    chunks = [tokens(1, 2, 16, seed=step).requires_grad_() for step in range(4)]
    for x in chunks:
        out = module(x)
    reached = torch.autograd.grad(out.sum(), chunks)
    far = [bool(gradient.any()) for gradient in reached]
    # The first query of the last chunk stands at 6 and sees down to 3 through a window of 4.
    assert far == ([True] * 4 if window is None else [False, True, True, True])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cut", ["detach", "no_grad call", "inference call"])
def test_where_gradients_are_cut(cut: str, window: int | None) -> None:
    module, straight = build(Options(window_size=window)), build(Options(window_size=window))
    first = tokens(1, 2, 16, seed=1).requires_grad_()
    second = tokens(1, 2, 16, seed=2).requires_grad_()
    middle = tokens(1, 1, 16, seed=3)
    module(first), straight(first)
    if cut == "detach":
        assert module.kv_cache.detach() is module.kv_cache
        module(middle)
    elif cut == "no_grad call":
        with torch.no_grad():
            module(middle)
    else:
        with torch.inference_mode():
            module(middle)
    straight(middle)
    out = module(second)
    assert torch.equal(out, straight(second)), "what is held does not change"
    to_first, to_second = torch.autograd.grad(out.sum(), [first, second], allow_unused=True)
    assert to_first is None or not to_first.any()
    assert to_second.any()


@pytest.mark.parametrize("window", [None, 2])
def test_a_graph_survives_later_calls_without_gradients(window: int | None) -> None:
    """What backward needs is not overwritten by a later call that writes into buffers."""
    module, alone = build(Options(window_size=window)), build(Options(window_size=window))
    x = tokens(1, 6, 16).requires_grad_()
    outputs = [module(x[:, :3]), module(x[:, 3:])]
    expected = [alone(x[:, :3]), alone(x[:, 3:])]
    with torch.no_grad():
        for step in range(5):
            module(tokens(1, 2, 16, seed=step))
    for actual, wanted in zip(gradients(module, x, outputs), gradients(alone, x, expected), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "rotary halves", "alibi", "t5 causal"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_gradcheck(scheme: str, window: int | None, softcap: float | None) -> None:
    """Gradients through two cached chunks, against finite differences, a padded and a fully masked query
    included."""
    options = Options(
        embed_dim=3,
        num_heads=2,
        num_groups=1,
        head_dim=4,
        window_size=window,
        softcap=softcap,
        scheme=SCHEMES[scheme],
    )
    module = build(options)
    mask = padding([(1, 2)], 3)

    def conversation(first: Tensor, second: Tensor) -> Tensor:
        module.kv_cache = None
        start = module(first, attention_mask=mask)
        hide = torch.ones(2, module.kv_cache.cached_length + 2, dtype=torch.bool)
        hide[0] = False
        return torch.cat([start, module(second, attn_bias=hide)], dim=1)

    inputs = [tokens(1, n, 3, seed=n).requires_grad_() for n in (3, 2)]
    assert torch.autograd.gradcheck(conversation, inputs)


def test_gradients_of_cross_attention_reach_the_source() -> None:
    """While gradients are recorded the source is projected at every call, so each call has its own graph."""
    module, plain = build(Options(causal=False)), build(Options(causal=False, cached=False))
    kv = tokens(2, 3, 16, seed=5).requires_grad_()
    x = tokens(2, 2, 16, seed=6).requires_grad_()
    for _ in range(2):
        mine = torch.autograd.grad(module(x, kv).square().sum(), [x, kv, module.k_proj.weight])
        theirs = torch.autograd.grad(plain(x, kv).square().sum(), [x, kv, plain.k_proj.weight])
        for actual, wanted in zip(mine, theirs, strict=True):
            torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=0)
        assert mine[1].any()


@pytest.mark.parametrize("external", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_padding_has_no_influence_on_gradients(external: bool, window: int | None, softcap: float | None) -> None:
    """Issues: flash-attention#1745, vllm#641. 0 x NaN: what padding contains reaches no gradient either."""
    options = Options(causal=not external, window_size=window, softcap=softcap, qk_norm=True)
    mask, kv_mask = padding([(1, 3), (0, 2)], 4), padding([(0, 2), (2, 3)], 5)
    clean_x, clean_kv = tokens(2, 4, 16, seed=1), tokens(2, 5, 16, seed=2)
    spoiled_x = clean_x.masked_fill(~mask[..., None], float("nan"))
    spoiled_kv = clean_kv.masked_fill(~kv_mask[..., None], float("nan"))

    def slopes(x: Tensor, kv: Tensor) -> list[Tensor]:
        module = build(options)
        x.requires_grad_(), kv.requires_grad_()
        source = {"kv": kv, "kv_mask": kv_mask} if external else {}
        for _ in range(2):
            out = module(x, attention_mask=mask, **source)
        wanted = [x, *([kv] if external else []), *module.parameters()]
        return list(torch.autograd.grad(out.square().sum(), wanted))

    for actual, wanted in zip(slopes(spoiled_x, spoiled_kv), slopes(clean_x, clean_kv), strict=True):
        assert torch.equal(actual, wanted)
