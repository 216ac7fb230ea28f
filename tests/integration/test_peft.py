"""Adapters of peft: with and without a task, switched, merged, saved, and in other places than attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from tests.integration.builders import decoder, encoder, encoder_decoder, token_ids, vectors
from transformer import KVCache, MultiHeadAttention
from transformer.errors import ArgumentError
from transformer.generation import generate

GROUPED = {"attention": "gqa", "num_groups": 2}


def lora(**options: Any) -> LoraConfig:
    """An adapter that is not zero at first, so that it can be seen to act."""
    chosen = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return LoraConfig(**{**chosen, **options})


def adapted(model: nn.Module, seed: int = 1, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(model, lora(**options)).eval()


def greedy(forward: Callable[[Tensor], Tensor], ids: Tensor, count: int) -> Tensor:
    """What generation is to give, by whole sequences."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat((ids, forward(ids)[:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_lora_on_a_decoder(task: str | None) -> None:
    """Adapters on, off, trained and merged, with any task of peft; the model's own config does not change."""
    model, ids = decoder(**GROUPED), token_ids(2, 6)
    config, plain = asdict(model.config), decoder(**GROUPED)
    wrapped = adapted(model, task_type=task)
    with torch.no_grad():
        active = wrapped(ids)
        assert (active - plain(ids)).abs().max() > 1e-3
        assert_close(wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)), active, atol=1e-5, rtol=0)
        with wrapped.disable_adapter():
            assert_close(wrapped(ids), plain(ids), atol=1e-6, rtol=0)
    wrapped.train()
    F.cross_entropy(wrapped(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    learning = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in wrapped.named_parameters() if "lora_" in name}
    torch.optim.SGD([each for each in wrapped.parameters() if each.requires_grad], 0.1).step()
    wrapped.eval()
    expected = greedy(wrapped, ids, 6)
    assert torch.equal(wrapped.generate(input_ids=ids, max_new_tokens=6), expected)
    assert torch.equal(wrapped.generate(input_ids=ids, max_new_tokens=6, use_cache=False), expected)
    assert torch.equal(generate(wrapped, ids, max_new_tokens=6), expected[:, 6:])
    with wrapped.disable_adapter():
        assert torch.equal(wrapped.generate(input_ids=ids, max_new_tokens=6), plain.generate(ids, max_new_tokens=6))
    merged = wrapped.merge_and_unload()
    assert merged is model
    assert type(merged.decoder.blocks[0].attention.q_proj) is nn.Linear
    assert torch.equal(merged.generate(ids, max_new_tokens=6), expected)
    assert asdict(model.config) == config
    assert type(model.config)(**model.config.to_dict()) == model.config


@pytest.mark.parametrize("task", [None, "SEQ_2_SEQ_LM"])
def test_lora_on_an_encoder_decoder(task: str | None) -> None:
    """By our own names of its inputs, whichever task."""
    model, source, target = encoder_decoder(), token_ids(2, 6), token_ids(2, 4, seed=1)
    real = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    wrapped = adapted(model, task_type=task)
    with torch.no_grad():
        active = wrapped(source_ids=source, target_ids=target, source_mask=real)
        with wrapped.disable_adapter():
            out = wrapped(source_ids=source, target_ids=target, source_mask=real)
            assert_close(out, encoder_decoder()(source, target, real), atol=1e-6, rtol=0)
    said = [wrapped.generate(source_ids=source, max_new_tokens=6, use_cache=use) for use in (True, False)]
    assert torch.equal(*said)
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        assert_close(merged(source, target, real), active, atol=1e-5, rtol=0)
    assert torch.equal(merged.generate(source, max_new_tokens=6), said[0])


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_lora_on_an_encoder(task: str | None) -> None:
    model, ids = encoder(), token_ids(2, 6)
    wrapped = adapted(model, task_type=task)
    with torch.no_grad():
        active = wrapped(input_ids=ids)
        with wrapped.disable_adapter():
            assert_close(wrapped(input_ids=ids), encoder()(ids), atol=1e-6, rtol=0)
        assert_close(wrapped.merge_and_unload()(ids), active, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states", "return_dict"])
def test_what_a_task_asks_for_beyond_logits_is_refused_by_name(name: str) -> None:
    ids = token_ids(2, 6)
    wrapped = adapted(decoder(), task_type="CAUSAL_LM")
    with pytest.raises(ArgumentError, match=rf"^{name}: "):
        wrapped(ids, **{name: ids})


def test_labels_give_the_loss_of_the_model() -> None:
    ids = token_ids(2, 6)
    wrapped = adapted(decoder(), task_type="CAUSAL_LM")
    output = wrapped(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(wrapped(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(output.loss, expected)
    assert_close(wrapped(ids, labels=ids, logits_to_keep=1).loss, expected)
    vectors = wrapped.base_model.model.embedding(ids)
    assert_close(wrapped(inputs_embeds=vectors, labels=ids).loss, expected)


def test_a_misspelled_argument_is_not_swallowed() -> None:
    for model in (decoder(), encoder(), encoder_decoder()):
        with pytest.raises((TypeError, ArgumentError), match="attention_maks"):
            model(token_ids(2, 6), attention_maks=None)


def test_prompt_tuning_is_refused() -> None:
    """It writes into embeddings and caches of a kind that our models do not take; peft itself may find out first."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises((ArgumentError, TypeError, AttributeError)):
        get_peft_model(decoder(), config)(token_ids(2, 6))


def test_an_adapter_switched_in_mid_conversation() -> None:
    """What was read stays as it was read; what comes then is read by the other adapter."""
    ids, turns = token_ids(2, 9), []
    wrapped = adapted(decoder(**GROUPED))
    torch.manual_seed(2)
    wrapped.add_adapter("second", lora())
    model = wrapped.base_model.model.enable_cache()
    with torch.no_grad():
        for adapter, chunk in (("default", ids[:, :5]), ("second", ids[:, 5:7]), ("default", ids[:, 7:])):
            wrapped.set_adapter(adapter)
            turns.append(wrapped(chunk))
    # The same by models of merged weights, between which the conversation moves.
    moving = None
    for turn, (adapter, chunk) in enumerate(
        (("default", ids[:, :5]), ("second", ids[:, 5:7]), ("default", ids[:, 7:]))
    ):
        merged = adapted(decoder(**GROUPED))
        torch.manual_seed(2)
        merged.add_adapter("second", lora())
        merged.set_adapter(adapter)
        plain = merged.merge_and_unload().enable_cache()
        if moving is not None:
            moving.install(plain)
        with torch.no_grad():
            assert_close(turns[turn], plain(chunk), atol=1e-5, rtol=0)
        moving = KVCache.from_model(plain).remove(plain)
    assert model.kv_cache.length == 9


@pytest.mark.parametrize("how", ["disable", "switch", "merge", "write"])
def test_a_kept_source_is_projected_anew_when_its_adapter_changes(how: str) -> None:
    """Cross-attention with its cache on, over the same source."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MultiHeadAttention(32, 4, use_kv_cache=True)

        def forward(self, x: Tensor, kv: Tensor) -> Tensor:
            return self.attention(x, kv)

    wrapped, x, kv = adapted(Reader(), target_modules=["k_proj", "v_proj"]), vectors(1, 2), vectors(1, 6, seed=1)
    attention = wrapped.base_model.model.attention
    wrapped.add_adapter("second", lora(target_modules=["k_proj", "v_proj"]))
    with torch.no_grad():
        before = wrapped(x, kv)
        assert_close(wrapped(x, kv), before)
        if how == "disable":
            wrapped.base_model.disable_adapter_layers()
        elif how == "switch":
            wrapped.set_adapter("second")
        elif how == "merge":
            wrapped.merge_adapter()
            attention.k_proj.base_layer.weight.data.mul_(0.5)
        else:
            attention.k_proj.lora_B["default"].weight.data.add_(0.3)
        after = wrapped(x, kv)
        attention.kv_cache = None
        assert_close(after, wrapped(x, kv), atol=1e-6, rtol=0)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["head"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["tokens", "q_proj"]},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_adapters_elsewhere_than_in_attention(options: dict) -> None:
    """Generation uses the head and the embedding that forward uses."""
    wrapped, ids = adapted(decoder(tied_embeddings=False), **options), token_ids(2, 6)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    assert torch.equal(wrapped.generate(input_ids=ids, max_new_tokens=6), greedy(wrapped, ids, 6))


# peft warns of norms that it does not know.
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        lora(use_rslora=True, bias="lora_only"),
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=["q_proj", "k_proj"], init_weights=False),
        peft.LNTuningConfig(target_modules=["norm_before"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_adapters(config: peft.PeftConfig) -> None:
    wrapped, ids = get_peft_model(decoder(**GROUPED), config).eval(), token_ids(2, 6)
    assert torch.equal(wrapped.generate(input_ids=ids, max_new_tokens=6), greedy(wrapped, ids, 6))


def test_a_conversation_moves_between_a_model_and_its_adapted_self(tmp_path: Path) -> None:
    """Its paths are those of the model without the wrapper."""
    ids, plain = token_ids(2, 7), decoder(**GROUPED)
    wrapped = adapted(decoder(**GROUPED))
    with torch.no_grad(), wrapped.disable_adapter():
        expected = plain(ids)
        plain.enable_cache()
        plain(ids[:, :6])
        plain.kv_cache.save(tmp_path / "conversation.safetensors")
        wrapped.base_model.model.enable_cache()
        cache = KVCache.load(tmp_path / "conversation.safetensors")
        cache.install(wrapped)
        assert_close(wrapped(ids[:, 6:]), expected[:, 6:], atol=1e-5, rtol=0)
        assert cache.layers.keys() == plain.kv_cache.layers.keys()


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_is_saved_and_loaded(task: str | None, tmp_path: Path) -> None:
    wrapped, ids = adapted(decoder(), task_type=task), token_ids(2, 6)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(decoder(), tmp_path).eval()
    with torch.no_grad():
        assert_close(again(ids), wrapped(ids), atol=1e-6, rtol=0)
