"""Kept sources of cross-attention: never stale after changes of weights, adapters, hooks or the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.integration.changes import CHANGES, attention
from tests.setups import padding, tokens

X, SOURCE = tokens(2, 2, 16), tokens(2, 5, 16, seed=1)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_kept_is_never_stale(name: str) -> None:
    """The same call after a change gives what a module without a cache gives."""
    make, change = CHANGES[name]
    module = make()
    x, source = tokens(2, 2, module.embed_dim), tokens(2, 5, module.embed_dim, seed=1)
    module(x, source)
    before = module(x, source)
    change(module)
    after = module(x, source)
    module.use_kv_cache = False
    expected = module(x, source)
    assert_same(after, expected)
    assert name.startswith("weights of another") or not torch.allclose(before, expected, atol=1e-3), "it is a change"


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
@pytest.mark.parametrize("config", [LoraConfig, IA3Config])
def test_adapters_of_peft(config: type) -> None:
    """Off and on again, another one, merged, and trained in between."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention()

        def forward(self, x: Tensor, source: Tensor) -> Tensor:
            return self.attention(x, source)

    given = {"target_modules": ["k_proj", "v_proj"]}
    given |= {"r": 2} if config is LoraConfig else {"feedforward_modules": []}
    model = get_peft_model(Model(), config(**given)).double().eval()
    model.add_adapter("other", config(**given))
    model.double().eval()
    numbers = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora" in name or "ia3" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=numbers, dtype=torch.float64))
    inner, seen = model.base_model.model.attention, []

    def check() -> None:
        kept = model(X, SOURCE)
        inner.use_kv_cache = False
        seen.append(model(X, SOURCE))
        inner.use_kv_cache = True
        assert_same(kept, seen[-1])

    check()
    with model.disable_adapter():
        check()
    check()
    model.set_adapter("other")
    check()
    model.base_model.merge_adapter()
    check()
    model.base_model.unmerge_adapter()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    check()
    active, off, again, other, merged, changed = seen
    assert_same([again, merged], [active, other])
    for one, two in ((active, off), (active, other), (other, changed)):
        assert not torch.allclose(one, two, atol=1e-3)


# --- the source itself ------------------------------------------------------------------------------------------------


def rewritten(source: Tensor) -> Tensor:
    source.data = source.data * 2
    return source


def through_numpy(source: Tensor) -> Tensor:
    source.numpy()[:] *= 2
    return source


def in_place(change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def changed(source: Tensor) -> Tensor:
        change(source)
        return source

    return changed


SOURCES: dict[str, Callable[[Tensor], Tensor]] = {
    "mul_": in_place(lambda source: source.mul_(2)),
    "mul_ of a detached alias": in_place(lambda source: source.detach().mul_(2)),
    "mul_ of a view": in_place(lambda source: source[:, 1:].mul_(2)),
    "data =": rewritten,
    "another tensor": lambda source: source * 2,
    "other rows": lambda source: source[[1, 0]],
    "fewer tokens": lambda source: source[:, :3],
    "features in another order": lambda source: source.flip(2),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_changed_source_is_read_anew(name: str, masked: bool) -> None:
    module, source = attention(), SOURCE.clone()
    mask = padding([(0, 5), (0, 3)], 5) if masked else None
    before = module(X, source, kv_mask=mask)
    source = SOURCES[name](source)
    mask = None if mask is None else mask[:, : source.shape[1]]
    after = module(X, source, kv_mask=mask)
    module.use_kv_cache = False
    expected = module(X, source, kv_mask=mask)
    assert_same(after, expected)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_a_changed_mask_is_seen() -> None:
    module, mask = attention(), padding([(0, 5), (0, 3)], 5)
    module(X, SOURCE, kv_mask=mask)
    mask[1, 3] = True
    after = module(X, SOURCE, kv_mask=mask)
    module.use_kv_cache = False
    assert_same(after, module(X, SOURCE, kv_mask=mask))
