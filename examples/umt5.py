"""The whole way of a UMT5 checkpoint: written by transformers, read here, its targets written with and without caches.

python examples/umt5.py [--tokens 48] [--layers 4]

The weights are random, so that nothing has to be downloaded: what is written means nothing, and has to be the same.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import UMT5Config, UMT5ForConditionalGeneration
from transformers.utils import logging

from transformer.checkpoints import load_model
from transformer.models import init_cache

VOCABULARY, WIDTH, SOURCE = 4000, 256, 64


def their_model(layers: int) -> UMT5ForConditionalGeneration:
    """A small UMT5 of transformers."""
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
    for parameter in model.parameters():  # as they begin, every token would be as likely as the next
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1.0)
    return model


def timed(what: str, tokens: int, write: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What is written, and tokens a second, the better of two times."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        out = write()
        seconds.append(time.perf_counter() - began)
    print(f"{what:<28} {tokens / min(seconds):8,.1f} tokens/s")
    return out, tokens / min(seconds)


@torch.inference_mode()
def main() -> None:
    """Prints that all ways agree, and how fast each is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=48, help="tokens to write")
    parser.add_argument("--layers", type=int, default=4, help="layers of encoder and decoder each")
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.layers < 1:
        parser.error("--tokens, --layers: expected at least two tokens and one layer")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)

    theirs = their_model(arguments.layers)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = load_model(folder)
        number = sum(parameter.numel() for parameter in model.parameters())
        print(f"{type(model).__name__} of {number:,} weights, read from what transformers wrote\n")

        source, count = torch.randint(2, VOCABULARY, (1, SOURCE)), arguments.tokens
        cached, fast = timed("with caches", count, lambda: model.generate(source, max_new_tokens=count))
        uncached, slow = timed("without", count, lambda: model.generate(source, max_new_tokens=count, use_cache=False))
        options = {"max_new_tokens": count, "do_sample": False, "decoder_start_token_id": 0}
        their_tokens, peer = timed("transformers, with caches", count, lambda: theirs.generate(source, **options))

        # The same with the cache in hand: one token after the other, over states that the encoder gave once.
        states = model.encoder(source)
        cache = init_cache(model.config, 1, count + 1, SOURCE)
        target = torch.cat((torch.tensor([[model.config.start_token]]), cached), 1)
        columns = [model.decoder(column, states, cache=cache, use_cache=True) for column in target.split(1, 1)]
        logits, whole = model.lm_head(torch.cat(columns, 1)), model(source, target)

    largest = (logits - whole).abs().max().item()
    print(f"\nspeed-up by the caches {fast / slow:.1f} times; {fast / peer:.1f} times transformers")
    print(f"the cache has read {cache.position} tokens in {len(cache.self_attention)} layers")
    print(f"logits with and without it differ by {largest:.1e} at most")
    if not torch.equal(cached, uncached) or not torch.equal(cached, their_tokens[:, 1:]) or largest > 1e-4:
        raise SystemExit("cached and uncached outputs, or transformers', differ")
    print("cached, uncached and transformers' outputs are the same")


if __name__ == "__main__":
    main()
