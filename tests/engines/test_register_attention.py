"""Tests of our kernel as an attention implementation of transformers' own models, compared with their eager one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.engines.their_models import CACHE, SIZES
from transformer.engines import register_attention
from transformer.engines.attention_function import modular_attention
from transformer.errors import ArgumentError, ConfigurationError, DtypeError, ShapeError

NAME = "modular_attention"
WINDOW = 5


@pytest.fixture(autouse=True)
def registered() -> None:
    register_attention()


def decoder(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)).eval()
    if name == "gemma2":
        capped = Gemma2Config(
            **SIZES, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=0.3, query_pre_attn_scalar=16
        )
        return Gemma2ForCausalLM(capped).eval()
    if name == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=WINDOW)).eval()
    if name == "qwen2":
        half = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
        return Qwen2ForCausalLM(half).eval()
    sinks = GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW, rope_parameters=None
    )
    model = GptOssForCausalLM(sinks).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


DECODERS = ("llama", "mistral", "gemma2", "gemma3", "qwen2", "gpt_oss")


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(1))


def padded(where: str) -> Tensor:
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, slice(0, 6) if where == "left" else slice(11, None)] = 0
    return mask


def both(model: PreTrainedModel, call: Any) -> tuple[Any, Any]:
    """What `call` gives with eager attention, and with ours."""
    results = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        results.append(call())
    return results[0], results[1]


def assert_close(ours: Tensor, eager: Tensor, real: Tensor | None = None) -> None:
    difference = (ours - eager).abs()
    if real is not None:
        difference = difference * real.unsqueeze(-1)
    assert float(difference.max()) <= 1e-6 * max(1.0, float(eager.abs().max()))


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_eager_attention(name: str, padding: str | None) -> None:
    model, tokens = decoder(name), ids(2, 17)
    real = None if padding is None else padded(padding)
    with torch.no_grad():
        eager, ours = both(model, lambda: model(tokens, attention_mask=real).logits)
    assert_close(ours, eager, real)
    assert ours.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generates_the_tokens_of_eager_attention(name: str, cache: str | None) -> None:
    model, tokens = decoder(name), ids(2, 17)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    if cache is not None:
        options["cache_implementation"] = cache
    # Without padding the first call over a static cache has no mask, and keys that are not there yet.
    for mask in (padded("left"), torch.ones_like(tokens)):
        eager, ours = both(model, lambda mask=mask: model.generate(tokens, attention_mask=mask, **options))
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_chunk_after_cached_tokens(name: str) -> None:
    model, tokens = decoder(name), ids(2, 17)

    def chunks() -> Tensor:
        cache = DynamicCache(config=model.config)
        return torch.cat([model(part, **{CACHE: cache}).logits for part in tokens.split([9, 6, 1, 1], 1)], 1)

    with torch.no_grad():
        eager, ours = both(model, chunks)
    assert_close(ours, eager)


def test_one_token_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = decoder("mistral"), []

    def spy(*args: Any, **options: Any) -> Any:
        masks.append(args[4])
        return modular_attention(*args, **options)

    monkeypatch.setattr("transformers.modeling_utils.AttentionInterface._global_mapping", {NAME: spy})
    model.config._attn_implementation_internal = NAME
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, 9), **{CACHE: cache})
        model(ids(1, 1), **{CACHE: cache})
    assert [mask is None for mask in masks] == [False, False, True, True]


@pytest.mark.parametrize("padding", [False, True])
def test_an_encoder_sees_in_both_directions(padding: bool) -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval()
    real = padded("right") if padding else None
    with torch.no_grad():
        eager, ours = both(model, lambda: model(ids(2, 17), attention_mask=real)[0])
    assert_close(ours, eager, real)


@pytest.mark.parametrize("length", [4, 25])
def test_an_encoder_decoder_with_a_bias_of_distances(length: int) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model, tokens = T5ForConditionalGeneration(config).eval(), ids(2, 17)
    nn.init.normal_(model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    for real in (None, padded("right")):
        with torch.no_grad():
            eager, ours = both(
                model, lambda real=real: model(tokens, attention_mask=real, decoder_input_ids=ids(2, length)).logits
            )
            assert_close(ours, eager)
            eager, ours = both(model, lambda real=real: model.generate(tokens, attention_mask=real, max_new_tokens=6))
            assert torch.equal(ours, eager)


def test_packed_sequences_do_not_see_each_other() -> None:
    model, tokens = decoder("llama"), ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        eager, ours = both(model, lambda: model(tokens, position_ids=positions, use_cache=False).logits)
        alone = model(tokens[:, 4:]).logits
    assert_close(ours, eager)
    assert_close(ours[:, 4:], alone)


def test_weights_are_returned_where_they_are_asked_for() -> None:
    for name in ("llama", "gpt_oss"):
        model = decoder(name)
        with torch.no_grad():
            eager, ours = both(model, lambda model=model: model(ids(2, 9), output_attentions=True).attentions)
        for mine, theirs in zip(ours, eager, strict=True):
            assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gradients_are_those_of_eager_attention(name: str) -> None:
    model, tokens = decoder(name), ids(2, 9)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    eager, ours = both(model, gradients)
    assert len(ours) == len(eager) > 10
    for mine, theirs in zip(ours, eager, strict=True):
        assert_close(mine, theirs)


def test_dropout_in_training_alone() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    module = nn.Module()
    plain = modular_attention(module.eval(), query, key, value, None, dropout=0.5)[0]
    assert torch.equal(plain, modular_attention(module, query, key, value, None)[0])
    draws = torch.stack(
        [modular_attention(module.train(), query, key, value, None, dropout=0.5)[0] for _ in range(2000)]
    )
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - plain).abs().max() < 0.15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, tokens = decoder("gemma2").to(dtype), ids(2, 17)
    with torch.no_grad():
        eager, ours = both(model, lambda: model(tokens, attention_mask=padded("left")).logits)
    assert ours.dtype is dtype
    assert ours.isfinite().all()
    real = padded("left").unsqueeze(-1)
    assert float(((ours - eager) * real).abs().max()) <= 8 * torch.finfo(dtype).eps


@pytest.mark.slow
def test_compiles_into_one_graph() -> None:
    model, tokens = decoder("llama"), ids(1, 9)
    model.set_attn_implementation(NAME)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(tokens, use_cache=False).logits, model(tokens).logits)


def test_a_name_is_checked() -> None:
    register_attention()
    register_attention("another_name")
    for name in ("sdpa", "eager", "flash_attention_2", "paged|eager", "my_flash", "", "a/b", 3, None):
        with pytest.raises(ArgumentError, match="name"):
            register_attention(name)  # type: ignore[arg-type]


def test_a_model_that_computes_attention_itself_is_refused() -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    model = BloomForCausalLM._from_config(config, attn_implementation=NAME)
    with pytest.raises(ConfigurationError, match="BloomAttention"):
        model(ids(1, 4))


def test_what_is_not_computed_is_refused_by_name() -> None:
    module, heads, keys = nn.Module(), torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    with pytest.raises(ArgumentError, match="sinks"):
        modular_attention(module, heads, keys, keys, None, sinks=torch.zeros(4))
    with pytest.raises(ArgumentError, match="read_index"):
        modular_attention(module, heads, keys, keys, None, read_index=[torch.zeros(1)])
    with pytest.raises(ArgumentError, match="attention_mask"):
        modular_attention(module, heads, keys[:, :, :2], keys[:, :, :2], None)
    with pytest.raises(ShapeError, match="value"):
        modular_attention(module, heads, keys, keys[..., :4], None)
    with pytest.raises(ShapeError, match="key"):
        modular_attention(module, heads, keys[:1], keys[:1], None)
    # Two rows of three keys would broadcast as two queries.
    for mask in (torch.ones(2, 3), torch.ones(2, 1, 3, 4), torch.ones(3, 1, 3, 3)):
        with pytest.raises(ShapeError, match="attention_mask"):
            modular_attention(module, heads, keys, keys, mask)
    with pytest.raises(DtypeError, match="attention_mask"):
        modular_attention(module, heads, keys, keys, torch.ones(2, 1, 3, 3, dtype=torch.long))
