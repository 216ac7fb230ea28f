"""Tests of our KV cache in transformers' own generate: equal tokens, and our operations on their models."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.engines.their_models import CACHE, SIZES
from transformer.cache import KVCache
from transformer.engines import TransformersCache
from transformer.errors import ArgumentError, CacheStateError, ConfigurationError, DtypeError, ShapeError

WINDOW = 12
MODELS = ("llama", "mistral", "gemma2", "t5")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "t5":
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)).eval()
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=WINDOW)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(1))


def generated(model: PreTrainedModel, tokens: Tensor, cache: Any, new: int = 20, **options: Any) -> Tensor:
    torch.manual_seed(2)
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new} | options
    result: Tensor = model.generate(tokens, **{CACHE: cache}, **options)
    return result


def read(model: PreTrainedModel, tokens: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens, **{CACHE: cache}).logits
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_generates_the_tokens_of_their_own_cache(name: str, way: str) -> None:
    model, tokens = build(name), ids(2, 17)
    mask = torch.ones_like(tokens)
    if way == "prompt lookup":
        # One row alone, of a text that is longer than the window and repeats itself.
        tokens = tokens[1:].repeat(1, 2)
        mask = torch.ones_like(tokens)
    elif name == "t5":
        mask[0, 11:] = 0
    else:
        mask[0, :6] = 0
    cache = TransformersCache(model.config)
    expected = generated(model, tokens, None, attention_mask=mask, **WAYS[way])
    assert torch.equal(generated(model, tokens, cache, attention_mask=mask, **WAYS[way]), expected)
    seen = expected.shape[1] - 1
    assert cache.get_seq_length() == cache.kv_cache.length == seen
    assert cache.kv_cache.cached_length == (WINDOW if name == "mistral" else seen)
    assert cache.batch_size == expected.shape[0] * WAYS[way].get("num_beams", 1)


def test_a_decoder_of_more_layers_than_its_encoder() -> None:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=3, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model, tokens = T5ForConditionalGeneration(config).eval(), ids(2, 17)
    cache = TransformersCache(config)
    assert torch.equal(generated(model, tokens, cache), generated(model, tokens, None, use_cache=False))
    sources = [layer.source for layer in cache.kv_cache.layers.values()]
    assert [None if source is None else source.key.shape[2] for source in sources] == [17] * 3


@pytest.mark.parametrize("name", MODELS[:3])
def test_logits_are_those_of_their_own_cache_however_a_text_is_cut(name: str) -> None:
    model, tokens = build(name), ids(2, 40)
    for cut in ([40], [1] * 40, [17, 1, 1, 14, 7], [3, 30, 1, 6]):
        theirs, ours = DynamicCache(config=model.config), TransformersCache(model.config)
        for part in tokens.split(cut, 1):
            sizes = [cache.get_mask_sizes(part.shape[1], layer) for cache in (theirs, ours) for layer in (0, 1)]
            assert sizes[:2] == sizes[2:]
            assert torch.equal(read(model, part, ours), read(model, part, theirs))
        assert ours.is_sliding == theirs.is_sliding
        assert [ours.get_max_length(layer) for layer in (0, 1)] == [theirs.get_max_length(layer) for layer in (0, 1)]


def test_a_step_copies_nothing_that_is_cached() -> None:
    model = build("llama")
    cache = TransformersCache(model.config)
    read(model, ids(1, 9), cache)
    keys = cache.kv_cache.layers["0"]["key"]
    for length in range(10, 40):
        read(model, ids(1, 1), cache)
        now = cache.kv_cache.layers["0"]["key"]
        assert now.shape[2] == length
        assert now.data_ptr() == keys.data_ptr()


@pytest.mark.parametrize("name", MODELS[:3])
def test_a_chat_goes_on_after_a_fork(name: str) -> None:
    model, first, one, two = build(name), ids(1, 30), ids(1, 5), ids(1, 7)
    cache = TransformersCache(model.config)
    text = generated(model, first, cache, new=6)
    branch = TransformersCache(model.config, cache.kv_cache.fork())
    for each, more in ((cache, one), (branch, two)):
        whole = torch.cat((text, more), 1)
        assert torch.equal(generated(model, whole, each, new=6), generated(model, whole, None, new=6))


@pytest.mark.parametrize("name", MODELS[:3])
def test_truncated_and_selected_rows_go_on(name: str) -> None:
    model, tokens = build(name), ids(3, 30)
    cache = TransformersCache(model.config)
    read(model, tokens, cache)
    cache.kv_cache.truncate(25).select([2, 0])
    fresh = DynamicCache(config=model.config)
    read(model, tokens[[2, 0], :25], fresh)
    assert torch.allclose(read(model, tokens[:2, :4], cache), read(model, tokens[:2, :4], fresh), atol=1e-6)


def test_operations_by_the_names_of_transformers() -> None:
    model, tokens = build("mistral"), ids(2, 30)
    cache = TransformersCache(model.config)
    read(model, tokens, cache)
    before = cache.kv_cache.layers["1"]["key"].clone()
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.kv_cache.layers["1"]["key"], before.repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(cache.kv_cache.layers["1"]["key"], before[[1, 0]])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.kv_cache.layers["1"]["key"], before)
    cache.crop(0)
    cache.crop(-4)
    assert cache.get_seq_length() == 26
    with pytest.raises(CacheStateError, match="length"):
        cache.crop(-20)
    with pytest.raises(ArgumentError, match="tokens_to_remove"):
        cache.crop(4)
    assert cache.get_seq_length() == 26
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.is_compileable) == (0, -1, False)
    assert torch.equal(read(model, tokens[:1], cache), model(tokens[:1]).logits)


def test_a_source_is_forgotten_with_its_tokens() -> None:
    model = build("t5")
    cache = TransformersCache(model.config)
    for tokens in (ids(2, 17), ids(3, 9)):
        assert not any(cache.is_updated.values())
        assert torch.equal(generated(model, tokens, cache), generated(model, tokens, None))
        assert all(cache.is_updated.values())
        cache.kv_cache.clear()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_by_itself(copied: Any) -> None:
    model, tokens = build("gemma2"), ids(1, 20)
    cache = TransformersCache(model.config)
    read(model, tokens, cache)
    other = copied(cache)
    assert torch.equal(read(model, tokens[:, :3], other), read(model, tokens[:, :3], cache))
    other.kv_cache.truncate(20)
    assert (other.get_seq_length(), cache.get_seq_length()) == (20, 23)


@pytest.mark.parametrize("name", ["mistral", "t5"])
def test_gradients_reach_the_first_call(name: str) -> None:
    model, tokens = build(name), ids(1, 9)

    def gradients(cache: Any) -> list[Tensor]:
        model.zero_grad()
        if name == "t5":
            first = model(tokens, decoder_input_ids=tokens[:, :4], **{CACHE: cache})
            source = (first.encoder_last_hidden_state,)
            last = model(encoder_outputs=source, decoder_input_ids=tokens[:, 4:], **{CACHE: cache})
        else:
            model(tokens[:, :4], **{CACHE: cache})
            last = model(tokens[:, 4:], **{CACHE: cache})
        last.logits.square().sum().backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    theirs: Any = DynamicCache(config=model.config)
    if name == "t5":
        theirs = EncoderDecoderCache(theirs, DynamicCache(config=model.config))
    expected = gradients(theirs)
    for mine, other in zip(gradients(TransformersCache(model.config)), expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-5)


PROGRAM = """
import json, sys
import torch
from transformers import MistralConfig, MistralForCausalLM
from transformer.cache import KVCache
from transformer.engines import TransformersCache
sizes, path, name, text = sys.argv[1:]
torch.manual_seed(0)
model = MistralForCausalLM(MistralConfig(**json.loads(sizes))).eval()
cache = TransformersCache(model.config, KVCache.load(path))
ids = torch.tensor([json.loads(text)])
print(json.dumps(model.generate(ids, **{name: cache}, do_sample=False, max_new_tokens=6, min_new_tokens=6)[0].tolist()))
"""


@pytest.mark.slow
def test_a_saved_conversation_goes_on_in_another_process(tmp_path: Path) -> None:
    model, path = build("mistral"), tmp_path / "chat"
    cache = TransformersCache(model.config)
    text = torch.cat((generated(model, ids(1, 30), cache, new=6), ids(1, 3)), 1)
    cache.kv_cache.save(path)
    given = [json.dumps(SIZES | {"sliding_window": WINDOW}), str(path), CACHE, json.dumps(text[0].tolist())]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *given], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == generated(model, text, None, new=6)[0].tolist()


def test_what_it_cannot_keep_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="LinearAttentionLayer"):
        TransformersCache(MambaConfig(num_hidden_layers=2))
    llama, mistral = build("llama"), build("mistral")
    cache = TransformersCache(llama.config)
    read(llama, ids(2, 5), cache)
    with pytest.raises(ArgumentError, match="window_size"):
        TransformersCache(mistral.config, cache.kv_cache)
    with pytest.raises(ArgumentError, match="layer"):
        TransformersCache(LlamaConfig(**(SIZES | {"num_hidden_layers": 1})), cache.kv_cache)
    for other in (llama, None, {}):
        with pytest.raises(ArgumentError, match=rf"^config: .* got {type(other).__name__}; give model\.config"):
            TransformersCache(other)
    with pytest.raises(ArgumentError, match=r"^kv_cache: .* got TransformersCache; .*kv_cache\.fork"):
        TransformersCache(llama.config, cache)
    layer = cache.layers[0]
    with pytest.raises(ShapeError, match="key_states"):
        layer.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    with pytest.raises(ShapeError, match="key_states"):
        layer.update(torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8))
    with pytest.raises(ShapeError, match="value_states"):
        layer.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 4))
    with pytest.raises(DtypeError):
        layer.update(torch.zeros(2, 2, 1, 8).half(), torch.zeros(2, 2, 1, 8).half())
    assert cache.get_seq_length() == 5


def test_a_compressed_cache_is_refused() -> None:
    """The masks of transformers count columns, of which some are gone."""
    model = build("llama")
    cache = TransformersCache(model.config)
    read(model, ids(1, 5), cache)
    cache.kv_cache.compress(3, lambda keys, values, *, positions: positions.float())
    with pytest.raises(CacheStateError, match="compress"):
        read(model, ids(1, 1), cache)
    assert cache.kv_cache.length == 5


def test_rows_of_different_lengths_are_refused() -> None:
    model = build("llama")
    caches = [TransformersCache(model.config) for _ in range(2)]
    for cache, length in zip(caches, (4, 6), strict=True):
        read(model, ids(1, length), cache)
    joint = TransformersCache(model.config, KVCache.join([cache.kv_cache for cache in caches]))
    with pytest.raises(CacheStateError, match="one length"):
        read(model, ids(2, 1), joint)
    joint.kv_cache.select([1])
    assert torch.allclose(read(model, ids(1, 1), joint), read(model, ids(1, 1), caches[1]), atol=1e-6)
