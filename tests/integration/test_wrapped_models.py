"""Models inside modules of users: generated from, or refused if a layer would lose its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.conversations import assert_same
from tests.integration import models as own
from tests.models.variants import decoder_only, ids
from tests.setups import fill, padding, tokens
from transformer import KVCache, MultiHeadAttention
from transformer.blocks import BlockStack, DecoderBlock, FeedForward, RMSNorm
from transformer.errors import AttentionError, CacheStateError, ConfigurationError
from transformer.generation import generate, stream

PROMPT, TURN = ids(2, 4), ids(2, 3, seed=5)
REAL = padding([(0, 4), (1, 3)], 4)


class Sequential(nn.Module):
    """It passes on what it is given by name, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([model])

    def forward(self, tokens: Tensor, **named: Tensor) -> Tensor:
        return self.parts[0](tokens, **named)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a module of the user's own": own.Around,
    "one that passes keywords on": Sequential,
    "two of them": lambda model: own.Around(own.Around(model)),
    "checkpoint_wrapper": checkpoint_wrapper,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
}

NAMES = [pytest.param(name, marks=pytest.mark.slow if "compile" in name else ()) for name in WRAPPERS]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_generate_and_stream(name: str) -> None:
    """With separate caches, which are on by themselves; the model's own generate gives the same."""
    model, plain = decoder_only("gqa rotary, window, both"), decoder_only("gqa rotary, window, both")
    wrapped = WRAPPERS[name](model).eval()
    for given in ({}, {"use_cache": False}, {"use_cache": "auto"}, {"num_beams": 2}, {"prefill_chunk_size": 2}):
        expected = plain.generate(PROMPT, REAL, max_new_tokens=4, **given)[:, 4:]
        assert_same(generate(wrapped, PROMPT, REAL, max_new_tokens=4, **given), expected)
    came = list(islice(stream(wrapped, PROMPT, max_new_tokens=9), 2))
    assert_same(came, list(islice(plain.stream(PROMPT, max_new_tokens=9), 2)))
    own.assert_without_caches(model)


def test_each_token_is_read_once() -> None:
    """So the caches are there, and not only the right result."""
    wrapped = own.Around(decoder_only()).eval()
    generate(wrapped, PROMPT, max_new_tokens=6)
    assert wrapped.columns == [4, 1, 1, 1, 1, 1]
    wrapped.columns.clear()
    generate(wrapped, PROMPT, max_new_tokens=3, use_cache=False)
    assert wrapped.columns == [4, 5, 6]


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_in_the_wrapped_model_goes_on(name: str) -> None:
    model, plain = (decoder_only("gqa relative, pattern").enable_cache() for _ in range(2))
    wrapped = WRAPPERS[name](model).eval()
    assert_same(generate(wrapped, PROMPT, max_new_tokens=3), plain.generate(PROMPT, max_new_tokens=3)[:, 4:])
    assert model.kv_cache.length == plain.kv_cache.length == 7
    assert_same(wrapped(TURN), plain(TURN))
    assert_same(next(stream(wrapped, TURN, max_new_tokens=2)), next(plain.stream(TURN, max_new_tokens=2)))
    assert KVCache.from_model(wrapped).length == plain.kv_cache.length == 14


def test_the_model_that_torch_compile_hands_out_is_the_original() -> None:
    """`torch.compile(model).generate` is the original's method."""
    model = decoder_only()
    expected = model.generate(PROMPT, max_new_tokens=5)
    assert_same(torch.compile(model, backend="eager").generate(PROMPT, max_new_tokens=5), expected)


# --- a layer that would forget ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cached", "path"), [((True, False), "second"), ((False, True), "first")])
def test_a_layer_without_a_cache_is_refused(cached: tuple[bool, bool], path: str) -> None:
    """A causal self-attention ran and kept nothing: the next token would not see the prompt."""
    model = own.Custom(cached)
    for call in (
        lambda: generate(model, PROMPT, max_new_tokens=4),
        lambda: generate(model, PROMPT, max_new_tokens=4, num_beams=2),
        lambda: next(stream(model, PROMPT, max_new_tokens=4)),
    ):
        with pytest.raises(CacheStateError, match=path):
            call()
        assert own.all_caches(model) == [None, None], "the other layer is as it was"
    whole = own.Custom((True, True))
    assert_same(generate(model, PROMPT, max_new_tokens=4, use_cache=False), generate(whole, PROMPT, max_new_tokens=4))


class WithEncoder(own.Custom):
    """It encodes a fixed source anew at each call, by an attention in which every token sees all the others."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = MultiHeadAttention(16, 4, dtype=torch.float64)
        self.reader = MultiHeadAttention(16, 4, use_kv_cache=True, dtype=torch.float64)
        fill(self, 0)
        self.source = tokens(2, 5, 16)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        memory = self.encoder(self.source)
        x = self.embedding(tokens)
        x = x + self.first(x, attention_mask=attention_mask)
        x = x + self.reader(x, memory)
        return self.head(x + self.second(x, attention_mask=attention_mask))


def test_a_layer_that_is_not_causal_needs_no_cache() -> None:
    model = WithEncoder().eval()
    expected = generate(model, PROMPT, REAL, max_new_tokens=6, use_cache=False)
    assert_same(generate(model, PROMPT, REAL, max_new_tokens=6), expected)
    assert model.first.kv_cache.length == 10
    assert model.encoder.kv_cache is None


@pytest.mark.parametrize("blocks", [[0], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("live", [False, True])
def test_an_attention_that_no_walk_meets_is_refused(blocks: list[int], live: bool) -> None:
    """In a plain list: if all are hidden, a cached loop has no cache; if one is hidden, it would lose its tokens."""
    model, plain = decoder_only(), decoder_only()
    for number in blocks:
        model.decoder.blocks[number] = own.HidingBlock(model.decoder.blocks[number])
    model.eval()

    def cached() -> None:
        if live:
            model.enable_cache()
        model.generate(PROMPT, max_new_tokens=4)

    with pytest.raises(AttentionError):
        cached()
    with pytest.raises(AttentionError):
        generate(own.Around(model), PROMPT, max_new_tokens=4)
    if not live:
        expected = plain.generate(PROMPT, max_new_tokens=4)
        assert_same(model.generate(PROMPT, max_new_tokens=4, use_cache=False), expected)


class Bigrams(nn.Module):
    """The next token's logits from the last token alone: no attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)
        fill(self, 0)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table(tokens)


def test_a_cached_loop_without_caches_is_refused() -> None:
    model = Bigrams().eval()
    with pytest.raises(AttentionError, match="use_cache"):
        generate(model, PROMPT, max_new_tokens=4)
    with pytest.raises(AttentionError, match="use_cache"):
        stream(model, PROMPT, max_new_tokens=4)
    assert generate(model, PROMPT, max_new_tokens=4, use_cache="auto").shape == (2, 4)


# --- stacks -----------------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """A block of the user's own that has no attention: each token is mixed with the mean of those up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)
        return x + self.mix(x.cumsum(1) / count)


def block() -> DecoderBlock:
    attention = own.Custom().first
    return DecoderBlock(attention, FeedForward(16, 20, "gelu"), RMSNorm)


@pytest.mark.parametrize(
    "wrap",
    [lambda b: own.OwnBlock(b), lambda b: own.OwnBlockWithoutStep(b), lambda b: own.Adapter(b), lambda _: Mixing()],
    ids=["own block", "own block without step", "adapter", "no attention"],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_stack_takes_any_module_with_the_forward_of_a_block(wrap: Callable[..., nn.Module], first: bool) -> None:
    plain, other = block(), wrap(block())
    modules = [other, plain] if first else [plain, other]
    stack, x = BlockStack(modules, RMSNorm(16)).double().eval(), tokens(2, 5, 16)
    fill(stack, 0)
    for attention in own.attentions(stack):
        attention.use_kv_cache = False
    expected = stack.norm(modules[1](modules[0](x)))
    assert_same(stack(x), expected)
    for attention in own.attentions(stack):
        attention.use_kv_cache = True
    if not isinstance(other, Mixing):
        assert_same(torch.cat((stack(x[:, :3]), stack(x[:, 3:])), 1), expected)


@pytest.mark.parametrize("other", [None, "block", torch.nn.functional.gelu, 3], ids=str)
def test_a_stack_takes_modules_only(other: object) -> None:
    with pytest.raises(ConfigurationError, match="block"):
        BlockStack([block(), other])
