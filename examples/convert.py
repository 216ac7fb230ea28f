"""Conversion of a trained multi-head model into grouped and multi-query attention: cache, time, bits per byte.

    python examples/convert.py                  # about three minutes on two cores

Each group of key/value heads is averaged into one (arXiv 2305.13245). That costs accuracy at first; a short further
training, the same for every model, gives most of it back. The cache shrinks with the number of key/value heads.
"""

import argparse
import time

import torch
from torch import Tensor

from byte_model import HEADS, bits_per_byte, new_model, train
from byte_text import read_bytes
from transformer import DecoderOnlyTransformer
from transformer.attention import to_gqa, to_mqa
from transformer.extras import require

# Tokens of context at which time and cache are measured, and rows of the batch.
CONTEXT, ROWS = 2048, 8


@torch.inference_mode()
def costs(models: dict[str, DecoderOnlyTransformer], text: Tensor) -> dict[str, tuple[int, float]]:
    """For each model: bytes of its caches at `CONTEXT` tokens, and milliseconds of one more token of every row.

    The models are measured in turn, so that other load on the machine affects all of them equally; the median counts.
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="to train the MHA model (default: %(default)s)")
    parser.add_argument(
        "--further", type=int, default=100, help="further training of each model (default: %(default)s)"
    )
    parser.add_argument("--window", type=int, default=128, help="tokens that a byte looks at (default: %(default)s)")
    options = parser.parse_args()
    if min(options.steps, options.further) < 0 or options.window < 1:
        parser.error("--steps, --further, --window: expected at least 0 of each, and a window of at least 1")
    require("examples", "tqdm")

    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain little from more, and the result would depend on the number
    text, cut = read_bytes(None)
    length = max(128, options.window)
    original = new_model("mha", HEADS, options.window)
    train(original, text[:cut], length, options.steps)
    models = {"MHA, 4": original, "GQA, 2": to_gqa(original, 2), "MQA, 1": to_mqa(original)}

    print(f"\n{'':>10}{'cache':>14}{'one token':>13}{'bits per byte':>16}{'after further':>16}")
    print(f"{'kv heads':10}{'bytes':>14}{'of each row':>13}{'as converted':>16}{'training':>16}")
    after = {}
    for name, (held, milliseconds) in costs(models, text).items():
        before, _ = bits_per_byte(models[name], text, cut)
        train(models[name], text[:cut], length, options.further, rate=0.3)
        after[name], _ = bits_per_byte(models[name], text, cut)
        print(f"{name:10}{held:14,}{milliseconds:10.2f} ms{before:16.3f}{after[name]:16.3f}")
    print(f"\n{ROWS} rows of {CONTEXT:,} tokens of context; further training: {options.further} steps for every model.")
    differences = [after[name] - after["MHA, 4"] for name in ("GQA, 2", "MQA, 1")]
    print("Shown: the converted models keep a half and a quarter of the cache; after further training", end=" ")
    print("their bits per byte differ from the MHA model's by {:+.3f} and {:+.3f}.".format(*differences))


if __name__ == "__main__":
    main()
