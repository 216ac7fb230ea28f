"""Text by a grammar: a small byte model generates JSON that fits a schema.

python examples/json_schema.py [--model FOLDER]     # a FOLDER that `language_model.py --save FOLDER` wrote

A grammar library says which bytes may follow the bytes of a row, and a processor excludes all others: greedy, sampled
and in beams, for rows of different lengths. Without it the model generates no JSON at all.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from byte_model import load_or_train
from transformer.extras import require
from transformer.generation import History, HistoryProcessor

END = 0  # the byte that ends a document: no JSON contains it
TOPICS = ("syntax", "types", "modules", "classes")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z_]{1,12}$"},
        "topics": {"type": "array", "items": {"enum": list(TOPICS)}, "minItems": 1, "maxItems": 3},
        "page": {"type": "integer", "minimum": 1, "maximum": 999},
        "draft": {"type": "boolean"},
    },
    "required": ["name", "topics", "page", "draft"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
PROMPTS = ("The next statement: ", "A list of modules, as JSON: ", "In Python: ")


class Bytes:
    """The vocabulary of the byte model, as llguidance reads one."""

    tokens = tuple(bytes([byte]) for byte in range(256))
    bos_token_id, eos_token_id = None, END

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


class Grammar(HistoryProcessor):
    """Excludes the bytes that no document of a grammar has after the new bytes of a row."""

    def __init__(self, schema: dict) -> None:
        tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
        self.start = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema))

    def process(self, history: History, scores: Tensor) -> Tensor:
        excluded = torch.zeros_like(scores, dtype=torch.bool)
        for row, written in history.new_tokens().items():
            # Read from its beginning each time, since rows come and go, and beams change places.
            matcher = self.start.deep_copy()
            matcher.consume_tokens(written)
            # 0 for a byte that must not follow.
            excluded[row] = torch.tensor(list(matcher.compute_logit_bias())) == 0
        return scores.masked_fill(excluded, -torch.inf)


def fits(text: str) -> bool:
    """True for JSON by the schema, checked by hand."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(found, dict)
        and found.keys() == {"name", "topics", "page", "draft"}
        and re.fullmatch("[a-z_]{1,12}", str(found["name"])) is not None
        and isinstance(found["topics"], list)
        and 1 <= len(found["topics"]) <= 3
        and set(found["topics"]) <= set(TOPICS)
        and type(found["page"]) is int
        and 1 <= found["page"] <= 999
        and type(found["draft"]) is bool
    )


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", type=Path, metavar="FOLDER", help="a trained model (default: train one now)")
parser.add_argument("--steps", type=int, default=100, help="training steps without --model (default: %(default)s)")
options = parser.parse_args()
require("examples", "llguidance", "safetensors" if options.model else "tqdm")
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper  # noqa: E402  # here, so that `--help` needs no extra

torch.manual_seed(0)
torch.set_num_threads(1)  # tensors this small gain little from more, and threads wait for each other
model = load_or_train(options.model, window=128, steps=options.steps).disable_cache()
longest = max(map(len, PROMPTS))
ids = torch.tensor([list(prompt.rjust(longest, "\0").encode()) for prompt in PROMPTS])
ways = {"greedy": {}, "sampled": {"temperature": 1.0, "num_return_sequences": 2}, "beams": {"num_beams": 4}}
counts = []
for processors in ([Grammar(SCHEMA)], []):
    print("By the grammar:" if processors else "\nWithout it:")
    texts = []
    for name, way in ways.items():
        chosen = {"max_new_tokens": 128, "stop_tokens": [END], "processors": processors, **way}
        for row in model.generate(ids, ids != END, **chosen)[:, longest:].tolist():
            texts.append(bytes(row).partition(bytes([END]))[0].decode(errors="replace"))
            print(f"    {name:8} {texts[-1][:100]!r}")
    counts.append(sum(map(fits, texts)))
if counts[0] < len(texts):
    raise SystemExit(f"{len(texts) - counts[0]} documents do not fit the schema")
print(f"\nShown: all {counts[0]} documents by the grammar fit the schema, and {counts[1]} of {len(texts)} without it.")
