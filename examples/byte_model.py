"""Byte-level language model of several examples: shape, training, evaluation, and files."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byte_text import random_rows, read_bytes
from transformer import AttentionError, DecoderOnlyTransformer
from transformer.checkpoints import load_model
from transformer.codecs import CacheDtypes

# Shape of the model: embed_dim E, query heads H, layers, width of the feed-forward networks.
WIDTH, HEADS, LAYERS, HIDDEN = 128, 4, 4, 256

# Bytes of one training step. In the same time, many small steps learn more than a few large ones.
STEP = 2048

# Bytes that a model reads in one call of the evaluation; the result does not depend on it.
CHUNK = 512


def new_model(kind: str, groups: int, window: int, heads: int = HEADS) -> DecoderOnlyTransformer:
    """An untrained model of the 256 bytes; the kinds mha, gqa and mqa differ in their number of key/value heads."""
    groups_or_none = groups if kind == "gqa" else None
    return DecoderOnlyTransformer(
        256, WIDTH, heads, HIDDEN, LAYERS, attention=kind, num_groups=groups_or_none, window_size=window
    )


# --- Training ---------------------------------------------------------------------------------------------------


def train(model: DecoderOnlyTransformer, text: Tensor, length: int, steps: int, rate: float = 1.0) -> None:
    """Trains the model to predict the next byte, on rows of `length` bytes at random places of `text`; caches are off.

    `rate` scales the learning rates: below 1 for a trained model, which large steps would make worse at first.
    """
    from tqdm import trange  # here, so that `--help` needs no extra

    matrices = [weight for weight in model.decoder.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim == 1] + [model.embedding.tokens.weight]
    # Muon learns several times as much from a step as AdamW, and there are only a few hundred steps.
    optimizers = [
        torch.optim.Muon(matrices, lr=0.04, weight_decay=0.1),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [rate * group["lr"] for group in groups]
    model.train()
    smooth = 8.0
    for step in (bar := trange(steps, desc="training", unit="step")):
        share = step / steps
        for group, peak in zip(groups, peaks, strict=True):  # a short warm-up, then a linear decay to zero
            group["lr"] = peak * min(1.0, 0.1 + share / 0.03) * (1 - share)
        rows = random_rows(text, max(1, STEP // length), length)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        smooth += 0.05 * (loss.item() / math.log(2) - smooth)
        bar.set_postfix_str(f"{smooth:.2f} bits per byte", refresh=False)


# --- Evaluation -------------------------------------------------------------------------------------------------


@torch.no_grad()  # FSDP2 refuses inference_mode in the first forward
def bits_per_byte(
    model: DecoderOnlyTransformer, text: Tensor, cut: int, cache_dtype: CacheDtypes = None
) -> tuple[float, set[int]]:
    """Bits per byte of the held-out `text[cut:]`, and the numbers of bytes that the caches had after each chunk.

    The text is read in chunks through the sliding window; each byte is predicted from what was read before it.
    """
    model.eval().clear_cache().enable_cache(cache_dtype=cache_dtype)
    bits, sizes = 0.0, set()
    for chunk, following in zip(text[cut - 1 : -1].split(CHUNK), text[cut:].split(CHUNK), strict=True):
        logits = model(chunk[None], expanding_context=False)[0]
        bits += F.cross_entropy(logits, following, reduction="sum").item() / math.log(2)
        sizes.add(model.kv_cache.nbytes)
    model.disable_cache()
    return bits / (len(text) - cut), sizes


# --- Files ------------------------------------------------------------------------------------------------------


def load(folder: Path) -> DecoderOnlyTransformer:
    """The model that `save_model` wrote; the program exits if the folder has none."""
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


def load_or_train(folder: Path | None, window: int, steps: int) -> DecoderOnlyTransformer:
    """The model in a folder, or a new one trained on the language reference of Python; its caches are on.

    In float64, so that examples may compare tokens one by one: read in pieces or at once, the logits differ by
    rounding alone, and in float32 that can decide between two bytes that are about as likely.
    """
    if folder:
        model = load(folder)
    else:
        model = new_model("gqa", groups=2, window=window)
        text, cut = read_bytes(None)
        train(model, text[:cut], max(128, window), steps)
    return model.double().eval().enable_cache()
