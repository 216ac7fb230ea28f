"""Backward through a cache: not broken by in-place writes, and not run over tokens that were appended twice."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.conversations import assert_same, cache_snapshot
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens
from transformer.errors import CacheStateError

KINDS = {"expanding": {}, "sliding": {"window_size": 3}, "sinks": {"window_size": 3, "num_sinks": 2}}


def gradients(module: nn.Module, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    loss = sum(out.square().sum() for out in outputs)
    return list(torch.autograd.grad(loss, [*inputs, *module.parameters()]))


@pytest.mark.parametrize("ragged", [False, True], ids=["equal rows", "rows apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_later_writes_leave_an_earlier_graph_whole(kind: str, ragged: bool) -> None:
    """Issues: transformers#43010 #28056, torchtune with gradients. In-place writes broke backward. Recorded chunks,
    then many calls that write into buffers, a `.to`, a `detach`, a `clear`, and only then backward: the gradients are
    those of a module that was left alone."""
    options = Options(scheme=SCHEMES["rotary halves"], num_groups=2, **KINDS[kind])
    results = []
    for disturbed in (False, True):
        module = build(options)
        with torch.no_grad():  # what is held when recording begins lies in buffers
            module(tokens(2, 5, 16, seed=7), attention_mask=padding([(0, 5), (2, 2)], 5) if ragged else None)
        inputs = [tokens(2, 3, 16, seed=step).requires_grad_() for step in range(2)]
        outputs = [module(x) for x in inputs]
        if disturbed:
            with torch.no_grad():
                for step in range(8):
                    module(tokens(2, 1 + step % 3, 16, seed=20 + step))
            with torch.inference_mode():
                module(tokens(2, 9, 16, seed=30))
            module.kv_cache.to(dtype=torch.float64).detach().clear()
            with torch.no_grad():
                module(tokens(1, 4, 16, seed=31))
        results.append(gradients(module, outputs, inputs))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_with_and_without_a_graph_alternate(kind: str) -> None:
    """Issues: transformers#43010. The same with recorded and other calls in turns, backward after each recorded one; a
    call without gradients cuts the graph, what is held goes on."""
    options = Options(scheme=SCHEMES["alibi"], **KINDS[kind])
    module, straight = build(options), build(options)
    for step in range(10):
        x = tokens(2, 2, 16, seed=step)
        with torch.no_grad():
            expected = straight(x)
            if step % 2:
                assert_same(module(x), expected)
        if step % 2 == 0:
            x.requires_grad_()
            out = module(x)
            assert_same(out.detach(), expected)
            out.square().sum().backward()
            assert x.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_only_detach_cuts_a_graph(kind: str) -> None:
    """Issues: flash-linear-attention#73. Reading, making room and moving between recorded calls leave the graph
    whole."""
    options = Options(**KINDS[kind])
    found = []
    for between in (lambda cache: cache, lambda cache: cache.reserve(100), lambda cache: cache.to(dtype=torch.float64)):
        module = build(options)
        x = tokens(1, 3, 16).requires_grad_()
        module(x)
        assert between(module.kv_cache) is module.kv_cache
        assert len(list(module.kv_cache.values())) == 2
        found += torch.autograd.grad(module(tokens(1, 1, 16, seed=1)).square().sum(), x)
    assert found[0].any()
    assert_same(found[1:], found[:1] * 2, atol=1e-12)


@pytest.mark.parametrize("source", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_recompute_is_refused(reentrant: bool, source: bool) -> None:
    """Issues: transformers#43010 #28056, flash-linear-attention#73. A checkpointed recompute appended the same tokens
    twice. It is refused inside backward, saying what to do; the cache holds each token once and goes on."""
    module = build(Options(causal=not source))
    kv = tokens(1, 4, 16, seed=3) if source else None
    x = tokens(1, 3, 16).requires_grad_()
    out = checkpoint(module, x, kv, use_reentrant=reentrant)
    before = cache_snapshot(module)
    with pytest.raises(CacheStateError, match=r"backward.*use_kv_cache"):
        out.sum().backward()
    assert cache_snapshot(module) == before
    if not source:
        assert module.kv_cache.length == 3
        straight = build(Options())
        following = tokens(1, 2, 16, seed=1)
        with torch.no_grad():
            straight(x.detach())
            assert_same(module(following), straight(following))


@pytest.mark.parametrize("scheme", ["none", "rotary halves", "t5 causal"])
@pytest.mark.parametrize("shared", [False, True], ids=["own step", "shared step"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_without_a_cache_checkpointing_works(reentrant: bool, shared: bool, scheme: str) -> None:
    """Issues: transformers#28056. What the refusal advises. Gradients of checkpointed layers are those of plain ones,
    with steps of their own and with one that all layers share."""
    layers = [build(Options(cached=False, window_size=3, scheme=SCHEMES[scheme]), seed=seed) for seed in range(2)]
    layers[1].position = layers[0].position
    found = []
    for checkpointed in (False, True):
        x = tokens(2, 6, 16).requires_grad_()
        out, step = x, layers[0].plan(x) if shared else None
        for layer in layers:
            run = partial(layer, step=step)
            out = checkpoint(run, out, use_reentrant=reentrant) if checkpointed else run(out)
        weights = [parameter for layer in layers for parameter in layer.parameters()]
        for parameter in weights:
            parameter.grad = None
        out.square().sum().backward()
        found.append([x.grad, *(parameter.grad.clone() for parameter in weights)])
    for actual, expected in zip(*found, strict=True):
        assert_same(actual, expected, atol=1e-12)


def test_a_frozen_layer_below_does_not_cut_what_a_shared_step_carries() -> None:
    """Issues: flash-linear-attention#73. A bias worked out without a graph by one layer is not for the next, which
    records."""
    layers = [build(Options(scheme=SCHEMES["t5 causal"], cached=False), seed=seed) for seed in range(2)]
    layers[1].position = layers[0].position
    x = tokens(1, 4, 16)
    found = []
    for shared in (False, True):
        step = layers[0].plan(x) if shared else None
        with torch.no_grad():
            below = layers[0](x, step=step)
        out = layers[1](below, step=step)
        found += torch.autograd.grad(out.square().sum(), layers[1].position.embedding.weight)
    assert torch.equal(found[0], found[1])
    assert found[0].any()
