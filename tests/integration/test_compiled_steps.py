"""Compiled calls with a cache: steps over a frozen layout, `KVCache.update`, and blocks inside a generation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from tests.integration.builders import DECODERS, VOCAB, decoder, encoder_decoder, padding, token_ids
from transformer import AttentionError, KVCache, MultiHeadAttention
from transformer.blocks import DecoderBlock, FeedForward, RMSNorm
from transformer.generation import generate
from transformer.positions import RotaryEmbedding

STEPS = 20
PROMPT = 6

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_compiled_yet")]


def compiled(module: Callable) -> Callable:
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


# tests/cache/test_static_layout.py has the other schemes, module by module.
@pytest.mark.parametrize(
    "kind",
    ["gqa qk norm", "rotary yarn", "alibi", "relative", "learned", "sinusoidal", "window sinks", "mixed pattern"],
)
@torch.no_grad()
def test_a_frozen_decoder_stays_one_graph(kind: str) -> None:
    """Prompts of different lengths; each step then equals the row of one call over everything."""
    options = DECODERS[kind]
    model, ids = decoder(**options), token_ids(3, PROMPT + STEPS)
    real = padding("left", 3, PROMPT)
    whole = torch.cat((real, torch.ones(3, STEPS, dtype=torch.bool)), 1)
    expected = model(ids, whole)
    model.enable_cache(max_length=64)
    model(ids[:, :PROMPT], real)
    model.kv_cache.freeze_layout()
    fast = compiled(model)
    outs = torch.cat([fast(ids[:, at : at + 1]) for at in range(PROMPT, PROMPT + STEPS)], 1)
    assert graphs() == 1
    assert_close(outs, expected[:, PROMPT:], atol=1e-5, rtol=0)
    assert model.kv_cache.lengths.tolist() == whole.sum(1).tolist()


@torch.no_grad()
def test_a_frozen_step_keeps_only_its_last_logits_where_asked() -> None:
    model, ids = decoder().enable_cache(max_length=20), token_ids(2, 9)
    expected = decoder()(ids)
    model(ids[:, :5])
    model.kv_cache.freeze_layout()
    fast = compiled(model)
    for at in range(5, 9):
        assert_close(fast(ids[:, at : at + 1], logits_to_keep=1), expected[:, at : at + 1], atol=1e-5, rtol=0)
    assert graphs() == 1


@torch.no_grad()
def test_a_frozen_encoder_decoder_stays_one_graph() -> None:
    model, source, target = encoder_decoder(), token_ids(3, 7), token_ids(3, 2 + STEPS, seed=1)
    real = padding("right", 3, 7)
    expected = model(source, target, real)
    states = model(source, source_mask=real)
    model.enable_cache(max_length=64)
    given = {"source_mask": real, "encoder_hidden_states": states}
    model(target_ids=target[:, :2], **given)
    model.kv_cache.freeze_layout()
    fast = compiled(model)
    outs = torch.cat([fast(target_ids=target[:, at : at + 1], **given) for at in range(2, 2 + STEPS)], 1)
    assert graphs() == 1
    assert_close(outs, expected[:, 2:], atol=1e-5, rtol=0)


def pairs(length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [3, 2, length, 8]."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, length, 8, generator=random), torch.randn(3, 2, length, 8, generator=random)


@torch.no_grad()
def test_update_traces_over_a_frozen_layout() -> None:
    """What comes back has one shape at every step, [B, G, max_length, D]: the held tokens, then unused slots."""
    keys, values = pairs(24)
    cache = KVCache(num_layers=2, num_kv_heads=2, head_dim=8, max_length=32)
    for layer in (0, 1):
        cache.update(layer, "self", keys[:, :, :4], values[:, :, :4])
    cache.freeze_layout()

    @compiled
    def step(key: Tensor, value: Tensor) -> list[Tensor]:
        return [*cache.update(0, "self", key, value), *cache.update(1, "self", 2 * key, value)]

    for at in range(4, 24):
        got = step(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        assert [each.shape for each in got] == [(3, 2, 32, 8)] * 4
        held = slice(0, at + 1)
        assert_close(got[0][:, :, held], keys[:, :, held], atol=0, rtol=0)
        assert_close(got[1][:, :, held], values[:, :, held], atol=0, rtol=0)
        assert_close(got[2][:, :, 4 : at + 1], 2 * keys[:, :, 4 : at + 1], atol=0, rtol=0)
        assert cache.length == at + 1
    assert graphs() == 1
    assert_close(cache.get(0, "self"), (keys, values), atol=0, rtol=0)


@torch.no_grad()
def test_update_refuses_what_no_longer_fits_also_when_traced() -> None:
    keys, values = pairs(4)
    cache = KVCache(num_layers=1, num_kv_heads=2, head_dim=8, max_length=4)
    cache.update(0, "self", keys[:, :, :3], values[:, :, :3])
    cache.freeze_layout()
    step = compiled(lambda key, value: cache.update(0, "self", key, value))
    step(keys[:, :, 3:], values[:, :, 3:])
    with pytest.raises((RuntimeError, AttentionError), match="full"):
        step(keys[:, :, 3:], values[:, :, 3:])
    assert_close(cache.get(0, "self"), (keys, values), atol=0, rtol=0)


# --- a compiled block that is called without a step, inside a cached generation ---------------------------------------


class OwnModel(nn.Module):
    """A model of a user's own, which knows nothing of steps."""

    def __init__(self, compiler: Callable[[nn.Module], nn.Module], use_kv_cache: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)
        rotary = RotaryEmbedding(8)
        self.blocks = nn.ModuleList(
            compiler(
                DecoderBlock(
                    MultiHeadAttention(32, 4, True, use_kv_cache, position=rotary), FeedForward(32, 64), RMSNorm
                )
            )
            for _ in range(2)
        )

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, attention_mask=attention_mask)
        return self.head(x)


COMPILERS = {
    "outside": lambda block: torch.compile(block, backend="eager"),
    "in place": lambda block: (block.compile(backend="eager"), block)[1],
    "fullgraph": lambda block: torch.compile(block, backend="eager", fullgraph=True),
}


def never_without_its_cache(call: Callable[[], Tensor], expected: Tensor) -> None:
    """Equal, or refused by the library, or by the compiler because `fullgraph` is not possible."""
    try:
        out = call()
    except (AttentionError, torch._dynamo.exc.Unsupported):
        return
    assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mask", "warm"), [(False, False), (True, True)], ids=["cold", "warm, padded"])
@pytest.mark.parametrize("compiler", COMPILERS.values(), ids=COMPILERS.keys())
def test_blocks_of_an_own_model(compiler: Callable, warm: bool, mask: bool) -> None:
    ids, real = token_ids(3, 7), padding("left", 3, 7) if mask else None
    plain = OwnModel(lambda block: block, use_kv_cache=False).eval()
    expected = generate(plain, ids, real, max_new_tokens=8, use_cache=False)
    model = OwnModel(compiler, use_kv_cache=True).eval()
    model.load_state_dict(dict(zip(model.state_dict(), plain.state_dict().values(), strict=True)))
    attentions = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    if warm:
        # Graphs of calls of these very shapes exist then, made where no generation was under way.
        for attention in attentions:
            attention.use_kv_cache = False
        with torch.inference_mode():
            for length in (7, 1, 2):
                never_without_its_cache(lambda length=length: model(ids[:, :length], None), plain(ids[:, :length]))
        for attention in attentions:
            attention.use_kv_cache = True
    for _ in range(2):
        never_without_its_cache(lambda: generate(model, ids, real, max_new_tokens=8), expected)
        for attention in attentions:
            attention.kv_cache = None


class WithoutStep(nn.Module):
    """A wrapper that does not hand the step on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *args: object, **given: object) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("compiler", [lambda block: block, *COMPILERS.values()], ids=["as it is", *COMPILERS])
def test_blocks_of_a_model_behind_a_wrapper_that_drops_the_step(compiler: Callable) -> None:
    ids = token_ids(2, 7)
    expected = decoder().generate(ids, max_new_tokens=8)
    model = decoder()
    with torch.inference_mode():
        model(ids)
    for index, block in enumerate(model.decoder.blocks):
        model.decoder.blocks[index] = WithoutStep(compiler(block))
        with torch.inference_mode():
            for length in (7, 1):
                model.decoder.blocks[index](torch.zeros(2, length, 32))
    model.eval()
    never_without_its_cache(lambda: model.generate(ids, max_new_tokens=8), expected)
    never_without_its_cache(lambda: model.generate(ids, max_new_tokens=8, use_cache=False), expected)
