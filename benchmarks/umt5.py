"""Generation with a small UMT5: tokens per second with caches, without caches, and of transformers."""

import copy
import tempfile
from functools import partial
from itertools import product

import torch
from transformers import UMT5Config as TheirConfig
from transformers import UMT5ForConditionalGeneration
from transformers.utils import logging

from transformer.checkpoints import load_model
from transformer.models import UMT5Config, UMT5Model

from .timing import Candidate, medians, print_table, reading

SOURCE = 64


def models() -> tuple[UMT5Model, UMT5ForConditionalGeneration]:
    """Ours and theirs with the same weights, chosen so that no two tokens are equally probable."""
    small = UMT5Config.small()
    config = TheirConfig(
        vocab_size=small.vocab_size,
        d_model=small.d_model,
        d_kv=small.head_dim,
        d_ff=small.d_ff,
        num_heads=small.num_heads,
        num_layers=small.num_layers,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    theirs = UMT5ForConditionalGeneration(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1.0)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        # A copy, because loaded weights are memory-mapped, and those of transformers are in ordinary memory.
        return copy.deepcopy(load_model(folder)), theirs


def run(lengths: tuple[int, ...] = (64,), batches: tuple[int, ...] = (1, 4, 8), rounds: int = 3) -> None:
    """Prints tokens a second of each, the two ratios, and the limit that reading the weights once per token sets."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    ours, theirs = models()
    read = [*ours.transformer.decoder.parameters(), *ours.transformer.head.parameters()]
    body = []
    for batch, length in product(batches, lengths):
        source = torch.randint(2, UMT5Config.small().vocab_size, (batch, SOURCE))
        options = {"do_sample": False, "decoder_start_token_id": 0, "pad_token_id": 0}
        candidates: dict[str, Candidate] = {
            "cached": partial(ours.generate, source, max_new_tokens=length),
            "uncached": partial(ours.generate, source, max_new_tokens=length, use_cache=False),
            "transformers": partial(theirs.generate, source, max_new_tokens=length, **options),
            "limit": reading(*read),
        }
        with torch.inference_mode():
            if not torch.equal(candidates["cached"](), candidates["transformers"]()[:, 1:]):
                print("float32 rounding differs: another token was the most probable at one step")
            seconds = medians(candidates, rounds, f"umt5, {batch} rows, {length} tokens", burst=1)
        seconds["limit"] *= length
        figures = [f"{batch * length / value:,.1f}" for value in seconds.values()]
        ratios = [f"{seconds[name] / seconds['cached']:.2f}" for name in ("uncached", "transformers")]
        body.append([str(batch), str(length), *figures, *ratios])
    print_table(
        f"UMT5-small ({sum(each.numel() for each in ours.parameters()) / 1e6:.0f}M weights, float32), {SOURCE} source "
        "tokens, tokens/s of `generate`, the encoder's time included",
        ["rows", "new", "cached", "uncached", "transformers", "limit", "x uncached", "x transformers"],
        body,
    )
