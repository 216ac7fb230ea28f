"""Sequences of train, eval, grad, no_grad and inference_mode in any order: right at each step."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conversations import assert_same
from tests.oracle import Options
from tests.setups import SCHEMES, build, tokens, without_cache

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
KINDS = {"expanding": {}, "sliding": {"window_size": 3}, "sinks": {"window_size": 2, "num_sinks": 2}}

CALLS = st.lists(
    st.tuples(
        st.sampled_from(sorted(MODES)),
        st.booleans(),
        st.sampled_from((1, 1, 2, 5)),
        st.sampled_from(("self", "self", "source", "changed source")),
        st.booleans(),
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=80)
@given(CALLS, st.sampled_from(sorted(KINDS)), st.sampled_from(("none", "rotary halves", "alibi", "t5 causal")))
def test_any_schedule(calls: list[tuple[str, bool, int, str, bool]], kind: str, scheme: str) -> None:
    """Self-attention calls are compared with a module without a cache over the whole sequence, calls with a source with
    one that projects it again. Gradients of a recorded call are finite and reach its input. There are two modules,
    because a causal one accepts no source."""
    options = Options(scheme=SCHEMES[scheme], num_groups=2, **KINDS[kind])
    module, plain = build(options), build(without_cache(options))
    reader = build(Options(causal=False, num_groups=2))
    plain_reader = build(Options(causal=False, num_groups=2, cached=False))
    kv, said = tokens(2, 4, 16, seed=99), tokens(2, 0, 16)
    for step, (mode, training, length, call, backward) in enumerate(calls):
        for part in (module, reader):
            part.train(training)
        x = tokens(2, length, 16, seed=step)
        x.requires_grad_(mode == "grad")
        if call == "changed source":
            kv += 0.5
        with MODES[mode]():
            if call == "self":
                said = torch.cat((said, x.detach().clone()), dim=1)
                out = module(x)
                expected = whole(plain, said)[:, -length:]
                assert module.kv_cache.length == said.shape[1]
            else:
                out = reader(x, kv)
                expected = whole(plain_reader, x, kv)
        assert out.requires_grad == (mode == "grad")
        assert_same(out.detach(), expected)
        if backward and mode == "grad":
            # As a training loop would: backward through this chunk, then cut, so that the graph is used once.
            out.square().sum().backward()
            assert x.grad.isfinite().all()
            assert x.grad.any()
            if module.kv_cache is not None:
                module.kv_cache.detach()


def whole(module: torch.nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module(*(tensor.detach() for tensor in inputs))
