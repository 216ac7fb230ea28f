"""Changes of dtype, device or batch during a conversation: refused, with a remedy that works."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import nn

from tests.conversations import assert_same, cache_snapshot
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens
from transformer.errors import DeviceError, DtypeError, ShapeError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
KINDS = {"expanding": {}, "sliding": {"window_size": 2}, "sinks": {"window_size": 2, "num_sinks": 2}}


def begun(kind: str, dtype: torch.dtype = torch.float64, ragged: bool = False) -> nn.Module:
    module = build(Options(scheme=SCHEMES["rotary halves"], num_groups=2, **KINDS[kind]), dtype=dtype)
    mask = padding([(0, 5), (1, 3), (0, 4)], 5) if ragged else None
    with torch.no_grad():
        module(tokens(3, 5, 16, dtype=dtype), attention_mask=mask)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_dtypes(kind: str) -> None:
    """A cache of one dtype in a module of another: refused, and after the stated `.to` the conversation continues."""
    for held, came in permutations(FLOATS, 2):
        module = build(Options(scheme=SCHEMES["rotary halves"], num_groups=2, **KINDS[kind]), dtype=came)
        cache = begun(kind, held, ragged=True).kv_cache
        module.kv_cache = cache
        before = cache_snapshot(module)
        for recorded in (False, True):
            x = tokens(3, 1, 16, dtype=came)
            with torch.set_grad_enabled(recorded), pytest.raises(DtypeError) as refusal:
                module(x)
            assert f".to(dtype={came})" in str(refusal.value), "the way out is in the message"
            assert cache_snapshot(module) == before
        cache.to(dtype=came)
        with torch.no_grad():
            assert module(x).dtype == came
        assert cache.lengths.tolist() == [6, 4, 5]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_on_another_device(kind: str, recorded: bool) -> None:
    module = begun(kind)
    module.kv_cache.to("meta")
    assert all(tensor.device.type == "meta" for tensor in module.kv_cache.values())
    held = module.kv_cache.cached_lengths.tolist()
    with torch.set_grad_enabled(recorded), pytest.raises(DeviceError, match=r"^x: .*meta.*kv_cache\.to\('cpu'\)"):
        module(tokens(3, 1, 16))
    assert module.kv_cache.cached_lengths.tolist() == held
    module.kv_cache = None
    assert module(tokens(3, 1, 16)).shape == (3, 1, 16)


@pytest.mark.parametrize("ragged", [False, True], ids=["equal rows", "rows apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_more_or_less(kind: str, ragged: bool) -> None:
    module, straight = begun(kind, ragged=ragged), begun(kind, ragged=ragged)
    before = cache_snapshot(module)
    for batch in (2, 4, 1, 0):
        for mask in (None, torch.ones(batch, 1, dtype=torch.bool), torch.zeros(batch, 1, dtype=torch.bool)):
            for recorded in (False, True):
                with (
                    torch.set_grad_enabled(recorded),
                    pytest.raises(ShapeError, match=r"^x: expected 3 rows") as refusal,
                ):
                    module(tokens(batch, 1, 16), attention_mask=mask)
                assert "kv_cache = None" in str(refusal.value), "the way out is in the message"
                assert cache_snapshot(module) == before
    x = tokens(3, 1, 16, seed=1)
    with torch.no_grad():
        assert torch.equal(module(x), straight(x))
        module.kv_cache = None
        assert module(tokens(2, 1, 16)).shape == (2, 1, 16)


def test_a_source_may_have_another_batch_in_the_next_call() -> None:
    """A source is no conversation: another one, of other rows, is simply projected."""
    module, plain = build(Options(causal=False)), build(Options(causal=False), use_kv_cache=False)
    with torch.no_grad():
        for batch in (3, 2, 4, 3):
            x, kv = tokens(batch, 1, 16), tokens(batch, 5, 16, seed=1)
            assert_same(module(x, kv), plain(x, kv))
