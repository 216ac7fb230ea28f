"""Continuous batching: requests join a running batch when they arrive, and leave it when they are done.

python examples/continuous_batching.py [--model FOLDER]     # a FOLDER that `language_model.py --save FOLDER` wrote

`Batch` reads the prompt of a request alone. Then each step generates one byte for every row, whatever the lengths. A
row does not depend on other rows: a request gets the bytes that it gets alone.
"""

import argparse
import random
import textwrap
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch

from byte_model import load_or_train
from transformer import Batch, DecoderOnlyTransformer
from transformer.extras import require

ROWS = 8  # requests that are served at once, at the most


class Request(NamedTuple):
    """The step at which a request arrives, its prompt, and the number of bytes to generate."""

    arrival: int
    prompt: list[int]
    count: int


def make_requests() -> list[Request]:
    """Beginnings of topics of Python's reference: 2 to 200 bytes, 1 to 80 to generate; some arrive after a pause."""
    pick, arrival, requests = random.Random(4), 0, []
    for topic in list(topics.values())[:24]:
        requests.append(Request(arrival, list(topic.encode())[: pick.randint(2, 200)], count=pick.randint(1, 80)))
        arrival += pick.choice([0, 1, 2, 3, 4, 5, 50])
    return requests


def write_together(model: DecoderOnlyTransformer, requests: list[Request]) -> tuple[list[torch.Tensor], list[int]]:
    """Serves all requests, at most ROWS at once: prompt and bytes of each, and how many rows each step had."""
    batch, numbers, finished, rows_per_step = Batch(model, max_rows=ROWS), [], {}, []
    while len(finished) < len(requests):
        for request in requests[len(numbers) :]:
            if request.arrival > len(rows_per_step):
                break
            numbers.append(batch.add(request.prompt, max_new_tokens=request.count))
        rows_per_step.append(len(batch.step()))
        finished |= batch.finished()
    return [finished[number] for number in numbers], rows_per_step


def write_alone(model: DecoderOnlyTransformer, request: Request) -> torch.Tensor:
    """The same of a request that is served alone."""
    model.clear_cache()
    return model.generate(torch.tensor([request.prompt]), max_new_tokens=request.count)[0]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", type=Path, metavar="FOLDER", help="a trained model (default: train one now)")
parser.add_argument("--steps", type=int, default=100, help="training steps without --model (default: %(default)s)")
options = parser.parse_args()
require("examples", "safetensors" if options.model else "tqdm")
torch.manual_seed(0)
torch.set_num_threads(1)  # tensors this small gain little from more, and threads wait for each other
model = load_or_train(options.model, window=128, steps=options.steps)
requests = make_requests()
start = time.perf_counter()
together, rows_per_step = write_together(model, requests)
middle = time.perf_counter()
alone = [write_alone(model, request) for request in requests]
end = time.perf_counter()
total = sum(rows_per_step)
print(f"{len(requests)} requests, {total:,} tokens in {len(rows_per_step)} steps; rows in each step:\n")
print(textwrap.fill("".join(map(str, rows_per_step)), 80, initial_indent="    ", subsequent_indent="    "))
if not all(map(torch.equal, together, alone)):
    raise SystemExit("a request got something else in the batch than alone")
print("\neach request got the tokens that it gets alone\n")
print(f"    in a running batch   {total / (middle - start):8,.0f} tokens/s")
print(f"    one after the other  {total / (end - middle):8,.0f} tokens/s")
print(f"\nShown: a running batch gives each of {len(requests)} requests the tokens that it gets alone,", end=" ")
print(f"{(end - middle) / (middle - start):.1f} times as fast.")
