"""Fine-tuning of a composition that no family of checkpoints covers, with transformers' Trainer and PEFT, for serving.

    python examples/engines/finetune.py --save composed           # about two minutes on two cores

The layers are composed by hand. `as_pretrained` makes a model of transformers that shares their weights: the Trainer
teaches it the language reference of Python, and LoRA the source code of a module. The merged weights come back, and
`save_model` writes them with a tokenizer of bytes. The saved folder gives the same tokens to the pipeline of
transformers, and answers `client.py` when a server has it:

    vllm serve composed --host 127.0.0.1 --dtype float32
    python examples/engines/client.py --model composed

docs/engines.md, "Serving", has the command for `transformers serve`.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer import DecoderOnlyTransformer, GroupQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.checkpoints import save_model
from transformer.extras import require
from transformer.positions import RotaryEmbedding

WIDTH, HEADS, GROUPS, PATTERN = 128, 4, 2, "near near near full"
rotary = RotaryEmbedding(WIDTH // HEADS)

# Rows of a training step, and bytes of a row.
ROWS, LENGTH = 16, 128


def layer(window: int | None = None) -> DecoderBlock:
    """Normed queries and keys, and norms before and after each branch."""
    attention = GroupQueryAttention(
        WIDTH, HEADS, GROUPS, True, bias=False, position=rotary, window_size=window, qk_norm=RMSNorm
    )
    return DecoderBlock(attention, GatedFeedForward(WIDTH, 2 * WIDTH), RMSNorm, placement="both")


def compose() -> DecoderOnlyTransformer:
    stack = BlockStack.from_pattern(PATTERN, 4, RMSNorm(WIDTH), near=lambda: layer(64), full=layer)
    return DecoderOnlyTransformer.from_parts(nn.Embedding(256, WIDTH), stack, nn.Linear(WIDTH, 256, bias=False))


def rows_of(text: bytes) -> tuple[Tensor, Tensor]:
    """The rows [N, LENGTH] to learn, and the last tenth, held out."""
    rows = torch.tensor(list(text)).unfold(0, LENGTH, LENGTH)
    return rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]


def train(engine_model: nn.Module, rows: Tensor, steps: int, rate: float) -> None:
    """Trains those weights of a model of transformers that record gradients."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=rate,
            warmup_steps=steps // 10,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        )
        Trainer(engine_model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]).train()


@torch.inference_mode()
def bits_per_byte(model: DecoderOnlyTransformer, rows: Tensor) -> float:
    logits = model.eval()(rows[:, :-1]).flatten(0, 1)
    return F.cross_entropy(logits, rows[:, 1:].flatten()).item() / math.log(2)


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are the 256 bytes, in the format of transformers and vLLM."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def timed(what: str, write: Any, count: int) -> list[int]:
    began = time.perf_counter()
    tokens = write()
    print(f"    {what:<24} {count / (time.perf_counter() - began):8,.0f} tokens/s")
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a composition with transformers' Trainer and PEFT.")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    parser.add_argument("--lora-steps", type=int, default=150, help="further steps, of LoRA (default: %(default)s)")
    parser.add_argument("--prompt", default="        self._", help="(default: %(default)r)")
    parser.add_argument("--tokens", type=int, default=64, help="bytes to write (default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the saved model")
    options = parser.parse_args()
    if not options.prompt or min(options.steps, options.lora_steps, options.tokens) < 1:
        parser.error("--prompt, --steps, --lora-steps, --tokens: expected a prompt, and at least one of each")
    if options.save and options.save.exists():
        parser.error(f"--save: expected a new folder, got {options.save}")
    require("examples", "safetensors", "tqdm", "transformers", "accelerate", "peft")
    from peft import LoraConfig, get_peft_model
    from transformers import pipeline

    from transformer.engines import as_pretrained, from_pretrained_weights

    torch.manual_seed(0)
    model = compose()
    english, held_out = rows_of("\n\n".join(dict.fromkeys(topics.values())).encode())
    untrained = bits_per_byte(model, held_out)
    print(f"(a) the language reference, {options.steps} steps: {untrained:.2f} bits per byte at first")
    engine_model = as_pretrained(model)
    train(engine_model, english, options.steps, 3e-3)
    # The engine's model shares the weights: what it has learned, the model knows.
    print(f"    after the training: {bits_per_byte(model, held_out):.2f} bits per byte")

    code, held_out = rows_of(Path(argparse.__file__).read_bytes())
    before = bits_per_byte(model, held_out)
    print(f"(b) source code, {options.lora_steps} steps of LoRA: {before:.2f} bits per byte at first")
    adapted = get_peft_model(engine_model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    train(adapted, code, options.lora_steps, 3e-3)
    model = from_pretrained_weights(adapted.merge_and_unload()).eval()
    after = bits_per_byte(model, held_out)
    print(f"    after {trained:,} weights of adapters were trained and merged: {after:.2f} bits per byte")

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.save or Path(temporary, "composed")
        save_model(model, folder)
        save_byte_tokenizer(folder)
        writer = pipeline("text-generation", str(folder))
        print(f"(c) {options.tokens} bytes after {options.prompt!r}")
        prompt = torch.tensor([list(options.prompt.encode())])
        ours = timed("generate", lambda: model.generate(prompt, max_new_tokens=options.tokens)[0], options.tokens)
        greedy = {"max_new_tokens": options.tokens, "do_sample": False, "return_tensors": True}
        theirs = timed(
            "transformers' pipeline", lambda: writer(options.prompt, **greedy)[0]["generated_token_ids"], options.tokens
        )
    if ours.tolist() != list(theirs):
        raise SystemExit("our own generate and the pipeline gave different tokens")
    print(f"    both gave the same tokens:\n\n{bytes(ours.tolist()).decode('utf-8', 'replace').rstrip()}\n")
    print(
        f"Shown: LoRA took a composition from {before:.2f} to {after:.2f} bits per byte of held-out source code, and "
        "its saved folder gives transformers the same tokens."
    )
    if options.save:
        print(f"saved: {options.save}")


if __name__ == "__main__":
    main()
