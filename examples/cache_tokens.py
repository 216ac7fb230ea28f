"""Caches of fewer tokens: the bits per byte that a trained model loses where only a share of its prompt is kept.

    python examples/language_model.py --window 512 --save FOLDER
    python examples/cache_tokens.py --model FOLDER --plot kept.png    # two minutes; without --model it trains one

Rows of held-out text: the model reads a prompt in one call, of which a `cache_budget` keeps so many tokens as a policy
says, and then the rest byte by byte within that budget. A window with attention sinks that caches as many tokens stands
beside them: it reads the prompt through the window too, so it never needs more memory than that.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from byte_model import load, new_model, train
from byte_text import read_bytes
from transformer import DecoderOnlyTransformer
from transformer.cache.policies import (
    AccumulatedAttention,
    AnyPolicy,
    KeyNorm,
    LastQueries,
    Random,
    SinksAndNewest,
)
from transformer.extras import require

ROW, PROMPT = 512, 384
SINKS = 4
SHARES = (2, 4, 8, 16, 32)
WINDOW_LINE = f"a window with {SINKS} sinks"


def and_newest(policy: AnyPolicy, number: int) -> AnyPolicy:
    """A policy of one's own: the newest tokens, and others by a policy that needs keys, values and positions alone."""

    def scores(keys: Tensor, values: Tensor, *, positions: Tensor) -> Tensor:
        newest = positions > positions.amax((1, 2), keepdim=True) - number
        return policy(keys, values, positions=positions).masked_fill(newest, torch.inf)

    return scores


def policies(keep: int) -> dict[str, AnyPolicy]:
    """Each policy by its name; where the number of newest tokens is an option, they get half of the budget."""
    half = keep // 2
    return {
        "attention of the last queries (SnapKV)": LastQueries(min(32, half)),
        "accumulated attention (H2O)": AccumulatedAttention(half),
        "sinks and newest": SinksAndNewest(SINKS),
        "norm of keys": KeyNorm(),
        "norm of keys, and the newest half": and_newest(KeyNorm(), half),
        "random": Random(),
        "random, and the newest half": and_newest(Random(), half),
    }


def like(model: DecoderOnlyTransformer, window: int | None, sinks: int = 0) -> DecoderOnlyTransformer:
    """The same weights in a model with another window."""
    other = DecoderOnlyTransformer.from_config(replace(model.config, window_size=window, num_sinks=sinks))
    other.load_state_dict(model.state_dict())
    return other.eval()


@torch.inference_mode()
def bits_after_prompt(model: DecoderOnlyTransformer, rows: Tensor) -> float:
    """Bits per byte after the prompt of rows [B, ROW], the first byte aside: it is predicted from all of the prompt."""
    model(rows[:, :PROMPT])
    bits = 0.0
    for token in range(PROMPT, ROW - 1):
        logits = model(rows[:, token : token + 1])[:, -1]
        bits += F.cross_entropy(logits, rows[:, token + 1]).item() / math.log(2)
    return bits / (ROW - 1 - PROMPT)


def measure(model: DecoderOnlyTransformer, rows: Tensor) -> tuple[float, dict[str, list[float]]]:
    """Bits per byte with all tokens, and by policy for each share; prints them as they come."""
    expanding = like(model, None)
    full = bits_after_prompt(expanding.enable_cache(), rows)
    print(f"{len(rows)} rows: {PROMPT} bytes of prompt, of which a share is kept, and {ROW - PROMPT} bytes after it.")
    print(f"Bits per byte of these: {full:.4f} with all tokens; more with\n")
    print(f"    {'':40}" + "".join(f"{f'1/{share}':>10}" for share in SHARES))
    print(f"    {'tokens':40}" + "".join(f"{PROMPT // share:10}" for share in SHARES))
    found: dict[str, list[float]] = {}
    for name in policies(PROMPT):
        budgets = ((PROMPT // share, policies(PROMPT // share)[name]) for share in SHARES)
        caches = (expanding.clear_cache().enable_cache(cache_budget=budget) for budget in budgets)
        found[name] = [bits_after_prompt(cached, rows) for cached in caches]
        show(name, found[name], full)
    windows = (like(model, PROMPT // share - SINKS, SINKS).enable_cache() for share in SHARES)
    found[WINDOW_LINE] = [bits_after_prompt(windowed, rows) for windowed in windows]
    show(WINDOW_LINE, found[WINDOW_LINE], full)
    return full, found


def show(name: str, bits: list[float], full: float) -> None:
    print(f"    {name:40}" + "".join(f"{each - full:+10.4f}" for each in bits), flush=True)


def plot(path: Path, full: float, found: dict[str, list[float]]) -> None:
    """Draws bits per byte against the share that is kept, without the policies that always lose over half a bit."""
    from matplotlib.figure import Figure  # here, since only --plot needs it

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn = {name: bits for name, bits in found.items() if min(bits) < full + 0.5}
    for marker, (name, bits) in zip("osD^vx*P", drawn.items(), strict=False):
        axes.plot([100 / share for share in SHARES], bits, label=name, marker=marker)
    axes.axhline(full, color="black", linestyle="--", linewidth=1, label="all tokens")
    axes.set_xscale("log", base=2)
    axes.set_xticks([100 / share for share in SHARES], [f"{100 / share:.3g}" for share in SHARES])
    axes.set(xlabel="tokens of the prompt that are cached (%)", ylabel="bits per byte after it")
    axes.set_title("Bits per byte where a part of the prompt is cached")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    print(f"\nplot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What KV caches of fewer tokens cost a trained model.")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a trained one (default: train one now)")
    parser.add_argument("--steps", type=int, default=500, help="training steps without --model (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=45, help="rows of text that are read (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bits per byte against the share that is kept")
    options = parser.parse_args()
    require("examples", "safetensors" if options.model else "tqdm", *["matplotlib"] * bool(options.plot))
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain little from more, and the result would depend on the number
    text, cut = read_bytes(None)
    rows = text[cut:].unfold(0, ROW, ROW)
    if not 1 <= options.rows <= len(rows):
        parser.error(f"--rows: expected from 1 to {len(rows)}, got {options.rows}")
    if options.plot and not options.plot.parent.is_dir():
        parser.error(f"--plot: expected a file in a folder that exists, got {options.plot}")
    if options.model:
        model = load(options.model)
        if (window := model.config.window_size) is not None and window < ROW:
            parser.error(f"--model: expected one trained with a window of at least {ROW}, got {window}")
    else:
        model = new_model("gqa", 2, ROW)
        train(model, text[:cut], ROW, options.steps)
    full, found = measure(model, rows[: options.rows])
    if options.plot:
        plot(options.plot, full, found)
    quarter = {name: bits[SHARES.index(4)] - full for name, bits in found.items()}
    best = min(quarter, key=quarter.__getitem__)
    print(
        f"\nShown: with a quarter of the prompt in the cache the model loses {quarter[best]:.4f} bits per byte, "
        f"at best, by {best}; {quarter[WINDOW_LINE]:.4f} by {WINDOW_LINE}."
    )


if __name__ == "__main__":
    main()
