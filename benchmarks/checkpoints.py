"""A Llama of 135M parameters compared with transformers: one decoded token, and loading the same files."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from transformer import DecoderOnlyTransformer, KVCache
from transformer.checkpoints import load_model

from .peers import CACHE
from .timing import Candidate, medians, print_table

SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)

RESET = 32
"""Tokens after which a conversation is truncated to its prompt, so that all steps have about the same length."""

# A first load brings libraries into memory, so that the peak of the measured load begins at zero.
LOADING = """
import gc, sys, time, torch

torch.set_num_threads(int(sys.argv[3]))
if sys.argv[1] == "ours":
    from transformer.checkpoints import load_model as load
else:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    load = LlamaForCausalLM.from_pretrained

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

load(sys.argv[2])
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
began = time.perf_counter()
model = load(sys.argv[2])
loaded = time.perf_counter()
for parameter in model.parameters():
    parameter.detach().sum()  # reading brings a mapped file into memory
read = time.perf_counter()
peak = (status("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters())
print(loaded - began, read - began, peak)
"""


def ours_decode(model: DecoderOnlyTransformer, prompt: Tensor) -> Candidate:
    """The next token, over a conversation that is truncated to its prompt at intervals."""
    model.clear_cache().enable_cache()
    state = model(prompt)[:, -1:].argmax(-1)
    cache = KVCache.from_model(model)

    def step() -> Tensor:
        nonlocal state
        if cache.length > prompt.shape[1] + RESET:
            cache.truncate(prompt.shape[1])
        state = model(state)[:, -1:].argmax(-1)
        return state

    return step


def their_decode(model: LlamaForCausalLM, prompt: Tensor) -> Candidate:
    """The same, over a DynamicCache."""
    cache = DynamicCache(config=model.config)
    state = model(prompt, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)

    def step() -> Tensor:
        nonlocal state
        if cache.get_seq_length() > prompt.shape[1] + RESET:
            cache.crop(prompt.shape[1] - cache.get_seq_length())
        state = model(state, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        return state

    return step


def loading(folder: Path, rounds: int) -> list[list[str]]:
    """Rows of median milliseconds and peak memory, measured in turn, each in its own process."""
    measured: dict[str, list[list[float]]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for name, found in measured.items():
            command = [sys.executable, "-c", LOADING, name, str(folder), str(torch.get_num_threads())]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            found.append([float(number) for number in printed[-3:]])
    rows = []
    for name, found in measured.items():
        loaded, read, peak = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append([name, f"{loaded * 1e3:,.0f}", f"{read * 1e3:,.0f}", f"{peak:.2f}"])
    return rows


@torch.inference_mode()
def run(lengths: tuple[int, ...] = (16, 1024), rounds: int = 20, loads: int = 5) -> None:
    """Prints decoded tokens per second at each length, and the time and memory of loading the checkpoint (on Linux)."""
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "llama"
        LlamaForCausalLM(SHAPE).save_pretrained(folder)
        ours, theirs = load_model(folder), LlamaForCausalLM.from_pretrained(folder).eval()
        body = []
        for length in lengths:
            prompt = torch.randint(SHAPE.vocab_size, (1, length))
            candidates = {"ours": ours_decode(ours, prompt), "transformers": their_decode(theirs, prompt)}
            seconds = medians(candidates, rounds, f"checkpoints, {length} tokens")
            speeds = [f"{1 / seconds[name]:.1f}" for name in candidates]
            body.append([f"{length:,}", *speeds, f"{seconds['transformers'] / seconds['ours']:.2f}"])
        print_table(
            "Decoded tokens per second, Llama of 135M parameters (batch 1, float32)",
            ["tokens held", "ours", "transformers", "x transformers"],
            body,
        )
        if Path("/proc/self/clear_refs").exists():
            print_table(
                "Loading it (float32, from files in the system's cache)",
                ["", "milliseconds", "until each weight was read once", "peak memory / weights"],
                loading(folder, loads),
            )
