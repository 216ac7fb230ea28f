"""A trained multi-head model made grouped and multi-query: what it saves, what it costs, what training mends.

    python examples/convert.py                  # about three minutes on two cores

The key/value heads of neighbours are averaged (arXiv 2305.13245), which hurts at first; a short further training, the
same for all, gives most of it back. The cache shrinks with the heads that are kept.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from byte_model import HEADS, new_model, train
from byte_text import read_bytes
from transformer import DecoderOnlyTransformer
from transformer.attention import to_gqa, to_mqa

# Bytes of context that the time per token and the cache are measured at, and the rows that are written side by side.
CONTEXT, ROWS = 2048, 8


@torch.inference_mode()
def loss(model: DecoderOnlyTransformer, text: Tensor, cut: int) -> float:
    """Bits per byte of the held-out text, read through the window."""
    model.eval().clear_cache()
    nats = 0.0
    for chunk, following in zip(text[cut - 1 : -1].split(512), text[cut:].split(512), strict=True):
        nats += F.cross_entropy(model(chunk[None])[0], following, reduction="sum").item()
    return nats / (len(text) - cut) / math.log(2)


@torch.inference_mode()
def costs(models: dict[str, DecoderOnlyTransformer], text: Tensor) -> dict[str, tuple[int, float]]:
    """Of each model the bytes of its caches at `CONTEXT` bytes of context, and milliseconds of one token of each row.

    The models take turns, so that whatever else the machine does meets all of them alike; the median counts.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval().enable_cache()(text[:CONTEXT].expand(ROWS, -1), expanding_context=True)
    held = {name: model.kv_cache.nbytes_used for name, model in models.items()}
    for _ in range(50):
        for name, model in models.items():
            start = time.perf_counter()
            model(text[:1].expand(ROWS, 1), expanding_context=True)
            times[name].append(time.perf_counter() - start)
    return {name: (held[name], 1000 * sorted(times[name])[len(times[name]) // 2]) for name in models}


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn a trained MHA model into GQA and MQA.")
    parser.add_argument("--seconds", type=float, default=60.0, help="to train the MHA model (default: %(default)s)")
    parser.add_argument("--further", type=float, default=20.0, help="to train each once more (default: %(default)s)")
    parser.add_argument("--window", type=int, default=128, help="tokens that a byte looks at (default: %(default)s)")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain little from more, and threads wait for each other
    text, cut = read_bytes(None)
    original = new_model("mha", HEADS, options.window)
    train(original, text[:cut], max(128, options.window), options.seconds)
    models = {"MHA, 4": original, "GQA, 2": to_gqa(original, 2), "MQA, 1": to_mqa(original)}

    print(f"\n{'':>10}{'cache':>14}{'one token':>13}{'bits per byte':>16}{'after further':>16}")
    print(f"{'kv heads':10}{'bytes':>14}{'of each row':>13}{'as converted':>16}{'training':>16}")
    for name, (held, milliseconds) in costs(models, text).items():
        model = models[name]
        before = loss(model, text, cut)
        train(model.train(), text[:cut], max(128, options.window), options.further, rate=0.3)
        print(f"{name:10}{held:14,}{milliseconds:10.2f} ms{before:16.3f}{loss(model, text, cut):16.3f}")
    print(f"\n{ROWS} rows of {CONTEXT:,} bytes of context; all trained {options.further:g} s more, the MHA model too.")


if __name__ == "__main__":
    main()
