"""A source is projected once: within a generation whatever the projections are, and by a loop of one's own while
nothing has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conversations import assert_same
from tests.integration.models import LowRank
from tests.models.variants import VOCAB, encoder_decoder, ids
from tests.setups import padding
from transformer import EncoderDecoderTransformer

SOURCE, PROMPT = ids(2, 5, VOCAB + 2), ids(2, 3)
REAL = padding([(0, 5), (0, 3)], 5)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_linear_pointwise", "mkldnn_linear")


class MatmulAttention(TorchDispatchMode):
    """Counts the products with some weights, without standing in their way."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.addresses = {weight.untyped_storage().data_ptr() for weight in weights}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            tensors = [a for a in args if isinstance(a, Tensor)]
            self.count += any(a.untyped_storage().data_ptr() in self.addresses for a in tensors)
        return func(*args, **(kwargs or {}))


class Counted(nn.Module):
    """In place of a projection: counts its calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.count = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.inner(x)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def plain(linear: nn.Linear) -> nn.Module:
    return linear


def with_hook(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda *_: None)
    return linear


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "plain": plain,
    "hooks": with_hook,
    "adapters": LowRank,
}


def model(kind: str = "plain", **more: Any) -> tuple[EncoderDecoderTransformer, list[Counted]]:
    """A model whose keys of sources are projected by modules of a kind, counted."""
    built, counted = encoder_decoder("mha rotary", **more), []
    for block in built.decoder.blocks:
        block.cross_attention.k_proj = Counted(KINDS[kind](block.cross_attention.k_proj))
        counted.append(block.cross_attention.k_proj)
    return built, counted


CALLS: dict[str, Callable[[EncoderDecoderTransformer], Tensor]] = {
    "generate": lambda m: m.generate(SOURCE, max_new_tokens=6),
    "generate, masked": lambda m: m.generate(SOURCE, REAL, max_new_tokens=6),
    "stream": lambda m: torch.stack(list(islice(m.stream(SOURCE, max_new_tokens=9), 6)), 1),
    "stream, masked": lambda m: torch.stack(list(islice(m.stream(SOURCE, REAL, max_new_tokens=9), 6)), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("live", [False, True])
def test_once_within_a_generation(name: str, kind: str, live: bool) -> None:
    built, counted = model(kind)
    if live:
        built.enable_cache()
    expected = CALLS[name](model(kind)[0])
    assert_same(CALLS[name](built), expected)
    assert [module.count for module in counted] == [1, 1]
    CALLS[name](built)
    assert [module.count for module in counted] == [2, 2], "and another one has a source of its own"


@pytest.mark.parametrize("kind", KINDS)
def test_without_caches_at_every_step(kind: str) -> None:
    built, counted = model(kind)
    out = built.generate(SOURCE, max_new_tokens=4, use_cache=False)
    assert_same(out, model(kind)[0].generate(SOURCE, max_new_tokens=4))
    assert [module.count for module in counted] == [4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_over_beams_projects_no_source_again(kind: str) -> None:
    """Its rows are chosen out of what is kept."""
    built, counted = model(kind)
    built.generate(SOURCE, max_new_tokens=6, num_beams=3)
    assert [module.count for module in counted] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_plain_linears(dtype: torch.dtype) -> None:
    """As many products with the weights of the keys as there are layers, in a generation and in a loop of one's own."""
    built = encoder_decoder("mha rotary", dtype)
    weights = [block.cross_attention.k_proj.weight for block in built.decoder.blocks]
    with MatmulAttention(*weights) as products:
        built.generate(SOURCE, max_new_tokens=6)
    assert products.count == 2
    memory = built.encode(SOURCE, REAL)
    built.enable_cache()
    with MatmulAttention(*weights) as products:
        for column in range(3):
            built.decode(PROMPT[:, column : column + 1], memory, REAL)
        assert products.count == 2
        built.decode(PROMPT[:, :1], memory.clone(), REAL.clone())
        assert products.count == 2, "equal content is the same source"
        weights[0].mul_(1.5)
        built.decode(PROMPT[:, :1], memory, REAL)
        assert products.count == 3, "one layer's weights have changed"
        built.decode(PROMPT[:, :1], 2 * memory, REAL)
        assert products.count == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_ones_own_is_right_whatever_the_projections_are(kind: str) -> None:
    """Projected anew or not: equal to one forward over everything."""
    built, _ = model(kind)
    memory = built.encode(SOURCE)
    expected = built.head(built.decode(PROMPT, memory))
    built.enable_cache()
    outs = [built.head(built.decode(PROMPT[:, at : at + 1], memory)) for at in range(3)]
    assert_same(torch.cat(outs, 1), expected)
