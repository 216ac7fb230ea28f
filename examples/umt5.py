"""UMT5 checkpoint from end to end: saved by transformers, loaded here, tokens generated with caches and without.

python examples/umt5.py [--tokens 48] [--layers 4]

The weights are random, so nothing is downloaded: the tokens are meaningless, but must be equal with and without caches.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformer.checkpoints import load_model
from transformer.extras import require
from transformer.models import init_cache

VOCABULARY, WIDTH, SOURCE = 4000, 256, 64


def reference_model(layers: int) -> Any:
    """A small UMT5 of transformers."""
    from transformers import UMT5Config, UMT5ForConditionalGeneration  # here, so that `--help` needs no extra
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    config = UMT5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=32,
        d_ff=512,
        num_heads=8,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        eos_token_id=None,
    )
    model = UMT5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # with the initial values all tokens would have about the same probability
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1.0)
    return model


def timed(what: str, tokens: int, write: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The tokens, and tokens per second, the better of two runs."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        out = write()
        seconds.append(time.perf_counter() - began)
    print(f"{what:<28} {tokens / min(seconds):8,.1f} tokens/s")
    return out, tokens / min(seconds)


@torch.inference_mode()
def main() -> None:
    """Prints whether all results are equal, and the speed of each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of encoder and decoder each (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.layers < 1:
        parser.error("--tokens, --layers: expected at least two tokens and one layer")
    require("examples", "transformers", "safetensors")
    torch.manual_seed(0)

    theirs = reference_model(arguments.layers)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = load_model(folder)
        number = sum(parameter.numel() for parameter in model.parameters())
        print(f"{type(model).__name__} of {number:,} weights, loaded from a checkpoint that transformers saved\n")

        source, count = torch.randint(2, VOCABULARY, (1, SOURCE)), arguments.tokens
        cached, fast = timed("with caches", count, lambda: model.generate(source, max_new_tokens=count))
        uncached, slow = timed("without", count, lambda: model.generate(source, max_new_tokens=count, use_cache=False))
        options = {"max_new_tokens": count, "do_sample": False, "decoder_start_token_id": 0}
        their_tokens, peer = timed("transformers, with caches", count, lambda: theirs.generate(source, **options))

        # The same with an explicit cache: one token after the other, over encoder states computed once.
        states = model.encoder(source)
        cache = init_cache(model.config, 1, count + 1, SOURCE)
        target = torch.cat((torch.tensor([[model.config.start_token]]), cached), 1)
        columns = [model.decoder(column, states, cache=cache, use_cache=True) for column in target.split(1, 1)]
        logits, whole = model.lm_head(torch.cat(columns, 1)), model(source, target)

    largest = (logits - whole).abs().max().item()
    print(f"\nthe cache has read {cache.position} tokens in {len(cache.self_attention)} layers")
    print(f"logits with and without it differ by {largest:.1e} at most")
    if not torch.equal(cached, uncached) or not torch.equal(cached, their_tokens[:, 1:]) or largest > 1e-4:
        raise SystemExit("cached and uncached outputs, or transformers', differ")
    print("cached, uncached and transformers' outputs are the same\n")
    print(
        f"Shown: with caches the {count} tokens came {fast / slow:.1f} times as fast as without caches, and "
        f"{fast / peer:.1f} times as fast as from transformers with its caches; they are the same in all three ways."
    )


if __name__ == "__main__":
    main()
