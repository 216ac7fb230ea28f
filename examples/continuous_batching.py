"""Continuous batching: requests join a running batch when they arrive, and leave it when they are done.

python examples/continuous_batching.py [--model FOLDER]     # a FOLDER that `language_model.py --save FOLDER` wrote

The prompt of a request is read alone. Then its cache joins the cache of the batch, and each step generates one byte for
every row, whatever the lengths. A row does not depend on other rows: a request gets the bytes that it gets alone.
"""

import argparse
import random
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch

from byte_model import load_or_train
from transformer import DecoderOnlyTransformer, KVCache
from transformer.extras import require

ROWS = 8  # requests that are served at once, at the most


@dataclass
class Request:
    """A prompt of at least two bytes, the step at which it arrives, and the number of bytes to generate."""

    arrival: int
    prompt: list[int]
    count: int
    written: list[int] = field(default_factory=list)


def make_requests() -> list[Request]:
    """Beginnings of topics of Python's reference: 2 to 200 bytes, 1 to 80 to generate; some arrive after a pause."""
    pick, arrival, requests = random.Random(4), 0, []
    for topic in list(topics.values())[:24]:
        requests.append(Request(arrival, list(topic.encode())[: pick.randint(2, 200)], count=pick.randint(1, 80)))
        arrival += pick.choice([0, 1, 2, 3, 4, 5, 50])
    return requests


def most_probable(model: DecoderOnlyTransformer, tokens: list[list[int]]) -> list[int]:
    """The most likely next byte of each row of new tokens `[B, L]`."""
    return model(torch.tensor(tokens))[:, -1].argmax(dim=-1).tolist()


def join(model: DecoderOnlyTransformer, running: list[Request], arrived: list[Request]) -> list[Request]:
    """Reads the prompts of new requests, each alone, and adds them as the last rows of the batch."""
    caches = [model.kv_cache.remove(model)] if running else []  # the model is empty for the prompts
    for request in arrived:
        model(torch.tensor([request.prompt[:-1]]))  # the last byte is read in the batch
        caches.append(model.kv_cache.remove(model))
    KVCache.join(caches).install(model)
    return running + arrived


def leave(model: DecoderOnlyTransformer, running: list[Request]) -> list[Request]:
    """Takes the rows of finished requests out of the batch. Where none is left, the next batch starts empty."""
    staying = [row for row, request in enumerate(running) if len(request.written) < request.count]
    if not staying:
        model.clear_cache()
    elif len(staying) < len(running):
        model.kv_cache.select(staying)
    return [running[row] for row in staying]


@torch.inference_mode()
def write_together(model: DecoderOnlyTransformer, waiting: list[Request]) -> list[int]:
    """Serves all requests, at most ROWS at once, and returns how many rows each step had."""
    running, rows_per_step = [], []  # `running` has the order of the batch's rows
    while waiting or running:
        arrived = [request for request in waiting if request.arrival <= len(rows_per_step)][: ROWS - len(running)]
        if arrived:
            waiting, running = waiting[len(arrived) :], join(model, running, arrived)
        rows_per_step.append(len(running))
        if running:
            # One step for all rows: each reads its newest byte, generated or the last of the prompt.
            unread = [(request.prompt + request.written)[-1:] for request in running]
            for request, byte in zip(running, most_probable(model, unread), strict=True):
                request.written.append(byte)
            running = leave(model, running)
    return rows_per_step


def write_alone(model: DecoderOnlyTransformer, request: Request) -> list[int]:
    """The bytes of a request that is served alone."""
    tokens = model.generate(torch.tensor([request.prompt]), max_new_tokens=request.count)
    model.clear_cache()
    return tokens[0, len(request.prompt) :].tolist()


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
rows_per_step = write_together(model, requests)
middle = time.perf_counter()
alone = [write_alone(model, request) for request in requests]
end = time.perf_counter()
total = sum(rows_per_step)
print(f"{len(requests)} requests, {total:,} tokens in {len(rows_per_step)} steps; rows in each step:\n")
print(textwrap.fill("".join(map(str, rows_per_step)), 80, initial_indent="    ", subsequent_indent="    "))
if [request.written for request in requests] != alone:
    raise SystemExit("a request got something else in the batch than alone")
print("\neach request got the tokens that it gets alone\n")
print(f"    in a running batch   {total / (middle - start):8,.0f} tokens/s")
print(f"    one after the other  {total / (end - middle):8,.0f} tokens/s")
print(f"\nShown: a running batch gives each of {len(requests)} requests the tokens that it gets alone,", end=" ")
print(f"{(end - middle) / (middle - start):.1f} times as fast.")
