"""Compiled decoding over buffers of fixed shape: one graph for all lengths, with the outputs of the eager module."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.conversations import assert_same
from tests.internals import static_tensors
from tests.oracle import Options
from tests.setups import SCHEMES, build, tokens
from transformer import KVCache, MultiHeadAttention, MultiQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, FeedForward, RMSNorm
from transformer.positions import ALiBi, RelativePositionBias, RotaryEmbedding, SinusoidalPositions

STEPS = 200


def graphs(module: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("kind", "groups", "window", "sinks", "scheme"),
    [
        ("MHA", 4, None, 0, "rotary halves"),
        ("MQA", 1, 5, 2, "rotary halves"),
        ("GQA", 2, 5, 0, "t5 causal"),
        ("GQA", 2, 3, 1, "alibi"),
        ("MQA", 1, None, 0, "none"),
    ],
)
def test_it_does_not_recompile(mode: type, kind: str, groups: int, window: int, sinks: int, scheme: str) -> None:
    """Issues: torchtune#1663, transformers#44609 #37908. A Python integer in the step recompiles for every token."""
    options = Options(num_groups=groups, window_size=window, num_sinks=sinks, scheme=SCHEMES[scheme])
    module = build(options, kind, max_cache_length=STEPS + 30).eval()
    plain = build(options, kind).eval()
    plain.use_kv_cache = False
    x = tokens(2, STEPS + 20, 16)
    with mode():
        expected = plain(x)
        outs = [module(x[:, :10])]
        module.kv_cache.freeze_layout()
        compiled = graphs(module)
        outs += [compiled(x[:, i : i + 1]) for i in range(10, STEPS + 10)]
        assert counters["stats"]["unique_graphs"] == 1
        assert (module.kv_cache.length, module.kv_cache.cached_length) == (
            STEPS + 10,
            window + sinks if window else STEPS + 10,
        )
        outs.append(module(x[:, STEPS + 10 :]))  # and goes on eagerly
    assert_same(torch.cat(outs, 1), expected)


@pytest.mark.slow
def test_a_full_cache_is_refused_with_nothing_written() -> None:
    module = build(Options(), "MHA", max_cache_length=8).eval()
    x = tokens(1, 9, 16)
    with torch.no_grad():
        module(x[:, :6])
        module.kv_cache.freeze_layout()
        compiled = graphs(module)
        for i in (6, 7):
            compiled(x[:, i : i + 1])
        before = module.kv_cache["key"].clone()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"max_cache_length: the cache is full"):
                compiled(x[:, 8:])
        assert module.kv_cache.length == 8
        assert torch.equal(module.kv_cache["key"], before)


@pytest.mark.slow
def test_a_whole_decoder_is_one_graph_and_notices_a_changed_source() -> None:
    rotary = RotaryEmbedding(4)

    def block(window: int | None) -> DecoderBlock:
        attention = MultiHeadAttention(
            16, 4, True, True, position=rotary, window_size=window, max_cache_length=80, dtype=torch.float64
        )
        reader = MultiQueryAttention(16, 4, use_kv_cache=True, max_cache_length=80, dtype=torch.float64)
        return DecoderBlock(attention, FeedForward(16, 32), RMSNorm, cross_attention=reader)

    stack = BlockStack([block(5), block(None), block(3)], RMSNorm(16)).double().eval()
    x, source, real = tokens(2, 60, 16), tokens(2, 4, 16, seed=1), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    given = {"source": source, "source_mask": real}
    with torch.inference_mode():
        stack(x[:, :10], **given)
        cache = KVCache.from_model(stack)
        eager = cache.fork()
        cache.freeze_layout()
        compiled = graphs(stack)
        outs = torch.cat([compiled(x[:, i : i + 1], **given) for i in range(10, 60)], 1)
        assert counters["stats"]["unique_graphs"] == 1
        source[0, 0] += 1.0
        with pytest.raises(RuntimeError, match=r"kv: changed since the layout was frozen"):
            compiled(x[:, :1], **given)
        source[0, 0] -= 1.0
        assert cache.length == 60
        cache.remove(stack)
        eager.install(stack)
        assert_same(outs, stack(x[:, 10:], **given))


def test_a_conversation_that_was_copied_without_a_token_can_be_frozen() -> None:
    """Its buffers have no slots: none is taken out of them."""
    module, x = build(Options(), "MHA", max_cache_length=8).eval(), tokens(2, 3, 16)
    with torch.no_grad():
        expected = module(x)
        module.kv_cache.truncate(0)
        module = copy.deepcopy(module)
        module.kv_cache.freeze_layout()
        assert module.kv_cache.length == 0
        assert_same(module(x), expected)


def test_a_guess_can_be_rejected_after_the_layout_was_frozen() -> None:
    """Over a window that a call has fixed too, which may be as wide as the cache may hold."""
    module, plain, x = (
        build(Options(), "MHA", max_cache_length=4),
        build(Options(cached=False), "MHA"),
        tokens(1, 7, 16),
    )
    with torch.no_grad():
        for chunk in x.split((4, 3), 1):
            module(chunk, expanding_context=False)
        module.kv_cache.freeze_layout().truncate(4)
        assert_same(module(x[:, 4:6], expanding_context=False), windowed(plain, x[:, :6])[:, 4:])


def cached_decoder() -> BlockStack:
    """Windows, sinks, every scheme of positions, and a source."""

    def block(position: object, window: int | None) -> DecoderBlock:
        options = {"use_kv_cache": True, "max_cache_length": 20}
        attention = MultiHeadAttention(
            16, 4, True, position=position, window_size=window, num_sinks=int(window is not None), **options
        )
        reader = MultiQueryAttention(16, 4, **options)
        return DecoderBlock(attention, FeedForward(16, 32), RMSNorm, cross_attention=reader)

    blocks = [block(RotaryEmbedding(4), 5), block(RelativePositionBias(4), None), block(ALiBi(4), 3)]
    return BlockStack(blocks, RMSNorm(16)).eval()


class Positioned(nn.Module):
    """A stack with positions from the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.positions = cached_decoder(), SinusoidalPositions(16)

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return self.stack(self.positions(x, self.stack.blocks[0].attention.plan(x)), source=source)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_allocated_rows_without_a_slot_can_be_frozen(cache_dtype: str | None) -> None:
    module = build(Options(), "MHA", max_cache_length=4, cache_dtype=cache_dtype).requires_grad_(False)
    module.kv_cache = cache = module.new_cache()
    cache.allocate(2, 0, torch.float64)
    cache.freeze_layout()
    assert cache["key"].shape == (2, 4, 0, 4)
    x = tokens(2, 3, 16)
    out = module(x)
    module.kv_cache = None
    assert_same(out, module(x))


@pytest.mark.slow
def test_a_compiled_step_stays_on_its_device() -> None:
    """CUDA graphs take in neither a tensor of the host nor a copy from it: every tensor of the graph is on the device,
    here one that holds no numbers."""
    devices = set()

    def look(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        devices.update(value.device.type for value in values if isinstance(value, torch.Tensor))
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        return lambda *_: [x[:, 8:]] * len(outputs)

    stack = Positioned().to("meta")
    x, source = torch.empty(2, 9, 16, device="meta"), torch.empty(2, 4, 16, device="meta")
    with torch.inference_mode():
        stack(x[:, :8], source=source)
        KVCache.from_model(stack).freeze_layout()
        torch._dynamo.reset()
        torch.compile(stack, fullgraph=True, backend=look)(x[:, 8:], source=source)
    assert devices == {"meta"}


@pytest.mark.slow
def test_a_second_conversation_takes_the_same_graph() -> None:
    """What compiled steps write into may lie elsewhere then: CUDA graphs are recorded anew, nothing is compiled."""
    stack, x, source = cached_decoder(), torch.randn(2, 12, 16), torch.randn(2, 4, 16)
    compiled = graphs(stack)
    with torch.inference_mode():
        cache = KVCache.from_model(stack)
        for length in (6, 9):
            cache.clear()
            stack(x[:, :length], source=source)
            cache.freeze_layout()
            for layer in cache.layers.values():
                assert {tensor._dynamo_static_input_type for tensor in static_tensors(layer)} == {"unguarded"}
            compiled(x[:, length : length + 1], source=source)
    assert counters["stats"]["unique_graphs"] == 1


def windowed(plain: nn.Module, x: torch.Tensor) -> torch.Tensor:
    plain.window_size = 4
    return plain(x)
