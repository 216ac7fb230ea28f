"""Model exported to ONNX with its cache as inputs and outputs: onnxruntime writes the text that the model writes.

python examples/engines/export.py
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F

from transformer import DecoderOnlyTransformer
from transformer.extras import require

WINDOW, SLOTS = 64, 256
PROMPTS = (b"The function ", b"A class definition is an executable statement")


def trained(steps: int) -> DecoderOnlyTransformer:
    """A model of bytes, with a window in every other layer, after some steps over the language reference of Python."""
    model = DecoderOnlyTransformer(
        256, 64, 4, 128, 4, attention="gqa", num_kv_heads=2, window_size=WINDOW, layer_pattern="sliding full"
    )
    text = torch.tensor(list("\n\n".join(dict.fromkeys(topics.values())).encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = text[torch.randint(len(text) - 128, (16, 1)) + torch.arange(129)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{steps} training steps: {loss.exp().log2().item():.2f} bits per byte")
    return model.eval()


def exported(model: DecoderOnlyTransformer) -> tuple[Any, Any]:
    """The decode step of the model, and a session of onnxruntime that has it."""
    import onnxruntime  # here, so that `--help` needs no extra

    from transformer.engines import decode_step

    step = decode_step(model, SLOTS)
    example = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), *step.empty_buffers(2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, options = Path(folder, "step.onnx"), {"dynamo": True, "external_data": False, "verbose": False}
        torch.onnx.export(step, example, path, dynamic_shapes=step.dynamic_shapes(), **options)
        return step, onnxruntime.InferenceSession(path)


def written(step: Any, session: Any, prompt: bytes, tokens: int) -> list[int]:
    """The prompt and the likeliest bytes after it, in one row over buffers that are as long as both."""
    ids, length = list(prompt), len(prompt) + tokens
    buffers = [each.numpy() for tensors in step.empty_buffers(1, length) for each in tensors]
    for position in range(length - 1):
        given = torch.tensor([ids[position : position + 1]]).numpy(), torch.tensor([position]).numpy(), *buffers
        logits, *buffers = session.run(None, {one.name: x for one, x in zip(session.get_inputs(), given, strict=True)})
        if position == len(ids) - 1:
            ids.append(int(logits.argmax()))
    return ids


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
parser.add_argument("--tokens", type=int, default=100, help="bytes to write (default: %(default)s)")
options = parser.parse_args()
if min(options.steps, options.tokens) < 1:
    parser.error("--steps, --tokens: expected at least 1 of each")
require("examples", "onnxruntime", "onnxscript", "transformers")
torch.manual_seed(0)
step, session = exported(model := trained(options.steps))
for prompt in PROMPTS:
    ids = written(step, session, prompt, options.tokens)
    own = model.generate(torch.tensor([list(prompt)]), max_new_tokens=options.tokens)[0].tolist()
    print(f"\n{bytes(ids).decode('utf-8', 'replace')}\n[the model's own text: {'equal' if ids == own else own}]")
