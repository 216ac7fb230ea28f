"""Loading of checkpoints of small models of several families, compared with transformers on the same files (Linux)."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from .checkpoints import SHAPE
from .grid import DTYPES
from .timing import print_table

CLASSES = {
    "Llama": LlamaForCausalLM,
    "GPT-NeoX": GPTNeoXForCausalLM,
    "BART": BartForConditionalGeneration,
    "BERT": BertForMaskedLM,
    "Mixtral": MixtralForCausalLM,
}
CONFIGS = {
    "Llama": SHAPE,
    "GPT-NeoX": GPTNeoXConfig(
        vocab_size=8192, hidden_size=768, num_hidden_layers=9, num_attention_heads=12, intermediate_size=3072
    ),
    "BART": BartConfig(vocab_size=16384, d_model=768, encoder_layers=4, decoder_layers=4),
    "BERT": BertConfig(vocab_size=16384, num_hidden_layers=9),
    "Mixtral": MixtralConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
}
"""Models of 70M to 135M parameters."""

# A first load brings libraries into memory, so that the peak of the measured load begins at zero.
LOADING = """
import gc, sys, time, torch

name, folder, threads, kind = sys.argv[1:]
torch.set_num_threads(int(threads))
if name == "ours":
    from transformer.checkpoints import load_model as load
else:
    import transformers
    from transformers.utils import logging
    logging.disable_progress_bar()
    load = getattr(transformers, kind).from_pretrained

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

load(folder)
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
began = time.process_time()
model = load(folder)
loaded = time.process_time()
for parameter in model.parameters():
    parameter.detach().sum()  # reading brings a mapped file into memory
read = time.process_time()
peak = (status("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters())
print(loaded - began, read - began, peak)
"""


def loading(folder: Path, kind: type[PreTrainedModel], rounds: int) -> dict[str, list[float]]:
    """Least CPU seconds and median peak memory, measured in turn, each in its own process."""
    measured: dict[str, list[list[float]]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for name, found in measured.items():
            command = [sys.executable, "-c", LOADING, name, str(folder), str(torch.get_num_threads()), kind.__name__]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            found.append([float(number) for number in printed[-3:]])
    columns = {name: list(zip(*found, strict=True)) for name, found in measured.items()}
    return {name: [min(loaded), min(read), statistics.median(peak)] for name, (loaded, read, peak) in columns.items()}


def run(rounds: int = 5) -> None:
    """Prints CPU time and peak memory of a load of each model, in each dtype."""
    body = []
    for name, kind in CLASSES.items():
        for word, dtype in DTYPES.items():
            with tempfile.TemporaryDirectory() as place:
                kind(CONFIGS[name]).to(dtype).save_pretrained(place)
                found = loading(Path(place), kind, rounds)
            for who, (loaded, read, peak) in found.items():
                body.append([name, word, who, f"{loaded * 1e3:,.0f}", f"{read * 1e3:,.0f}", f"{peak:.3f}"])
    print_table(
        "Loading (files in the system's cache)",
        ["model", "dtype", "", "CPU milliseconds", "until each weight was read once", "peak memory / weights"],
        body,
    )
