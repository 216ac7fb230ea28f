"""The byte-level model that several examples use: its shape, its training, and its folder."""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from byte_text import read_bytes
from transformer import AttentionError, DecoderOnlyTransformer
from transformer.checkpoints import load_model

# The model: its shapes are written with the letters of the library, B rows, L tokens, E = WIDTH.
WIDTH, HEADS, LAYERS, HIDDEN = 128, 4, 4, 256

# Bytes of one training step: many small steps learn more in the same time than a few large ones.
STEP = 2048


def new_model(kind: str, groups: int, window: int) -> DecoderOnlyTransformer:
    """A model of the 256 bytes; its three kinds differ only in how many key/value heads they keep."""
    groups_or_none = groups if kind == "gqa" else None
    return DecoderOnlyTransformer(
        256, WIDTH, HEADS, HIDDEN, LAYERS, attention=kind, num_groups=groups_or_none, window_size=window
    )


# --- Training ---------------------------------------------------------------------------------------------------


def train(model: DecoderOnlyTransformer, text: Tensor, length: int, seconds: float, rate: float = 1.0) -> None:
    """Learn for so long to say what comes next, from rows of `length` bytes; the caches are off.

    A `rate` below 1 is for what has learnt before: large steps would first undo that.
    """
    matrices = [weight for weight in model.decoder.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim == 1] + [model.embedding.tokens.weight]
    # Muon learns from each step several times what AdamW does, and there is time for a few hundred steps only.
    optimizers = [
        torch.optim.Muon(matrices, lr=0.04, weight_decay=0.1),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [rate * group["lr"] for group in groups]
    bar = tqdm(total=seconds, desc="training", bar_format="{desc}: {bar} {n:.0f} of {total:.0f} s{postfix}")
    start, smooth = time.perf_counter(), 8.0
    # The rate rises for a moment and then falls to nothing, by the clock: a slow machine too gets all of the schedule.
    while (share := (time.perf_counter() - start) / seconds) < 1:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, 0.1 + share / 0.03) * (1 - share)
        starts = torch.randint(len(text) - length, (max(1, STEP // length), 1))
        rows = text[starts + torch.arange(length + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        smooth += 0.05 * (loss.item() / math.log(2) - smooth)
        bar.set_postfix_str(f"{smooth:.2f} bits per byte", refresh=False)
        bar.update(min(seconds, time.perf_counter() - start) - bar.n)
    bar.close()


# --- Its folder -------------------------------------------------------------------------------------------------


def load(folder: Path) -> DecoderOnlyTransformer:
    """The model that `save_model` wrote; the program ends where the folder holds none."""
    try:
        model = load_model(folder)
    except (OSError, AttentionError) as error:
        raise SystemExit(f"{folder}: expected a model that language_model.py --save wrote ({error})") from error
    if model.config.vocab_size != 256:
        raise SystemExit(
            f"{folder}: expected a model that language_model.py --save wrote (of 256 tokens, the bytes; "
            f"this one has {model.config.vocab_size})"
        )
    return model


def load_or_train(folder: Path | None, window: int, seconds: float) -> DecoderOnlyTransformer:
    """The model in a folder, or a new one that has learnt Python's own reference for so long; its caches are on.

    In double precision, so that examples may compare what was written token by token: read in pieces or at once, the
    logits differ by rounding alone, and in single precision that can decide between two bytes about as likely.
    """
    if folder:
        model = load(folder)
    else:
        model = new_model("gqa", groups=2, window=window)
        text, cut = read_bytes(None)
        train(model, text[:cut], max(128, window), seconds)
    return model.double().eval().enable_cache()
