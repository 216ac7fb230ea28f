"""Soft prompt: a few trained vectors in front of a text, while the model that reads them stays as it is.

    python examples/soft_prompt.py                    # minutes on two cores
    python examples/soft_prompt.py --model FOLDER     # a model that language_model.py --window 256 --save wrote

A byte-level model learns the language reference of Python, and is then frozen. It is to read source text of Python,
which it has not learned. Only `--vectors` vectors are trained for that (arXiv 2104.08691):
`model(inputs_embeds=...)` reads them and then the embedded bytes, and the loss of `labels` counts the bytes alone. The
program prints the bits per byte of held-out source text without the vectors and with them, and what
`generate(inputs_embeds=...)` writes.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from byte_model import load, new_model, train
from byte_text import read_bytes
from transformer import DecoderOnlyTransformer
from transformer.extras import require

ROW = 128
"""Bytes of a row of the training and of the evaluation."""

IGNORED = -100


def loss_of(model: DecoderOnlyTransformer, soft: Tensor, rows: Tensor) -> Tensor:
    """Mean loss of the bytes of `rows` int64 [B, L], each row after the vectors `soft` [n, E]."""
    vectors = torch.cat((soft.expand(len(rows), -1, -1), model.embedding(rows)), 1)
    # The first byte never counts, so that the same bytes count without vectors before them.
    unseen = torch.full((len(rows), soft.shape[0] + 1), IGNORED)
    loss: Tensor = model(inputs_embeds=vectors, labels=torch.cat((unseen, rows[:, 1:]), 1)).loss
    return loss


@torch.inference_mode()
def bits_per_byte(model: DecoderOnlyTransformer, soft: Tensor, text: Tensor) -> float:
    """Bits per byte of a text in rows of `ROW` bytes, each after the vectors."""
    rows = text[: len(text) // ROW * ROW].view(-1, ROW)
    losses = [loss_of(model, soft, part).item() * len(part) for part in rows.split(16)]
    return sum(losses) / len(rows) / math.log(2)


def tune(model: DecoderOnlyTransformer, soft: nn.Parameter, text: Tensor, steps: int) -> None:
    """Trains the vectors, and nothing else, on rows at random places of the text."""
    from tqdm import trange  # here, so that `--help` needs no extra

    optimizer = torch.optim.Adam([soft], lr=0.02)
    for step in (bar := trange(steps, desc="soft prompt", unit="step")):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        starts = torch.randint(len(text) - ROW, (8, 1))
        loss = loss_of(model, soft, text[starts + torch.arange(ROW)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix_str(f"{loss.item() / math.log(2):.2f} bits per byte", refresh=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a few vectors in front of a frozen model's text.")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model that language_model.py --save wrote")
    parser.add_argument("--vectors", type=int, default=16, help="vectors of the soft prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    require("examples", "tqdm", *["safetensors"] * bool(options.model))
    if options.vectors < 1 or options.steps < 1:
        parser.error("--vectors, --steps: expected at least 1")
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # tensors this small gain little from more, and the result would depend on the number

    if options.model:
        model = load(options.model)
    else:
        model = new_model("gqa", groups=2, window=2 * ROW)
        reference, cut = read_bytes(None)
        train(model, reference[:cut], 2 * ROW, 300)
    model.eval().requires_grad_(False)
    text, cut = read_bytes(Path(argparse.__file__))
    # Vectors begin as embedded bytes of the text.
    soft = nn.Parameter(model.embedding(text[: options.vectors]).clone())
    before = bits_per_byte(model, soft[:0], text[cut:])
    untrained = bits_per_byte(model, soft, text[cut:])
    tune(model, soft, text[:cut], options.steps)
    after = bits_per_byte(model, soft, text[cut:])
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{soft.numel():,} numbers were trained; {weights:,} weights stayed as they are\n")
    print("bits per byte of held-out source text:")
    print(f"    without a soft prompt      {before:6.2f}")
    print(f"    after its first bytes      {untrained:6.2f}")
    print(f"    after the trained vectors  {after:6.2f}")
    written = model.generate(inputs_embeds=soft.detach()[None], max_new_tokens=120, temperature=0.5, seed=options.seed)
    print(f"\nwritten after the trained vectors alone:\n{bytes(written[0].tolist()).decode(errors='replace')}")
    if after >= before:
        raise SystemExit("the trained vectors do not help")


if __name__ == "__main__":
    main()
