"""transformers' Trainer, PEFT and pipelines over the engines' modules, and the weights back in our own model."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from transformer.engines import ModularForCausalLM, as_pretrained, from_pretrained_weights
from transformer.errors import ConfigurationError
from transformer.models import DecoderOnlyTransformer

from .compositions import model_of, options, unsettled

# PEFT and older releases of transformers use names that 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

TEXT = "the cat sat on the mat, the dog sat on the log, and the frog sat on the bog. "


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte, and one for padding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


def small_model() -> DecoderOnlyTransformer:
    """A composition that no known family describes: a window in every other layer, norms on both sides."""
    return DecoderOnlyTransformer(
        **options(vocab_size=257, window_size=8, layer_pattern="sliding full", norm_placement="both", dropout=0.1)
    )


def train(model: torch.nn.Module, folder: Path) -> list[float]:
    """Losses of a few steps of the Trainer, which saves a checkpoint after the last one."""
    tokenizer = byte_tokenizer()
    rows = [tokenizer(TEXT[start : start + 40]) for start in range(0, 36, 3)]
    arguments = TrainingArguments(
        folder,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=8,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_trainer_reduces_the_loss_of_our_model_and_saves(checkpointing: bool, tmp_path: Path) -> None:
    model = small_model().train()
    engine = as_pretrained(model)
    if checkpointing:
        engine.gradient_checkpointing_enable()
    losses = train(engine, tmp_path)
    assert losses[-1] < 0.8 * losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    ids = torch.tensor([byte_tokenizer()(TEXT[:20]).input_ids])
    back = from_pretrained_weights(engine)
    with torch.no_grad():
        expected = model.eval()(ids)
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(back.eval()(ids), expected)


def test_lora_trains_merges_and_comes_back(tmp_path: Path) -> None:
    model = unsettled(small_model())
    ids = torch.tensor([byte_tokenizer()(TEXT[:20]).input_ids])
    before = model(ids).detach()
    adapted = get_peft_model(
        as_pretrained(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    losses = train(adapted, tmp_path / "run")
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigurationError, match="merge_and_unload"):
        from_pretrained_weights(adapted)
    with pytest.raises(ConfigurationError, match="merge adapters"):
        from_pretrained_weights(adapted.base_model.model)
    expected = adapted.eval()(ids).logits.detach()
    merged = adapted.merge_and_unload()
    assert type(merged) is ModularForCausalLM
    back = from_pretrained_weights(merged).eval()
    torch.testing.assert_close(back(ids), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, before, atol=1e-2)
    greedy = merged.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=256)
    assert torch.equal(back.generate(ids, max_new_tokens=10, temperature=0.0), greedy)


def test_pipeline_gives_our_tokens(tmp_path: Path) -> None:
    """A folder with a tokenizer is all that a pipeline needs; rows of different lengths are padded on the left."""
    model = unsettled(small_model())
    as_pretrained(model).save_pretrained(tmp_path / "saved")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "saved")
    generator = pipeline("text-generation", str(tmp_path / "saved"), device="cpu")
    texts = ["the cat", "a log in the bog"]
    results = generator(texts, max_new_tokens=6, do_sample=False, batch_size=2)
    for text, result in zip(texts, results, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        expected = tokenizer.decode(model.generate(ids, max_new_tokens=6, temperature=0.0)[0])
        assert result[0]["generated_text"] == expected


def test_model_of_learned_positions_trains_from_left_padding() -> None:
    """Positions count real tokens, so padding changes neither logits nor gradients."""
    model = model_of("learned, layer norm, plain")
    engine = as_pretrained(model)
    ids = torch.randint(1, 61, (1, 9))
    padded, mask = (torch.cat((torch.zeros(1, 3).long(), part), 1) for part in (ids, torch.ones_like(ids)))
    found = []
    for given in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        engine.zero_grad()
        engine(**given).logits[:, -9:].square().mean().backward()
        found.append(engine.model.embed_positions.weight.grad.clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)
