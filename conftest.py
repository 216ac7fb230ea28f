"""Runs every ```python block of the documents, and holds the documents to what they say is printed.

The blocks of one document share a namespace. A ```text or ```output fence that directly follows a block
claims that block's standard output; in it, `...` stands for any run of characters on its line.
"""

import difflib
import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import pairwise

from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

DOCUMENTS = ["README.md", "KV_CACHE_EXAMPLES.md", "docs/*.md", "docs/*/*.md"]

# Pictures are drawn without a display.
os.environ["MPLBACKEND"] = "agg"

find_fences = FencedCodeBlockLexer(language=".+")
run_python = PythonEvaluator()


def parse_python_blocks(document: Document) -> Iterator[Region]:
    """Each Python fence, with the output that the document claims for it, if any."""
    fences = sorted(find_fences(document), key=lambda fence: fence.start)
    for fence, following in pairwise([*fences, None]):
        if not is_written_in(fence, "python", "py"):
            continue
        claimed = None
        if following is not None and is_written_in(following, "text", "output"):
            is_next = not document.text[fence.end : following.start].strip()
            claimed = content(document, following) if is_next else None
        yield Region(
            fence.start,
            fence.end,
            parsed=fence.lexemes["source"],
            evaluator=run_and_compare,
            lexemes={"claimed": claimed},
        )


def is_written_in(fence: Region, *languages: str) -> bool:
    return fence.lexemes["language"].split()[0] in languages


def content(document: Document, fence: Region) -> str:
    """The lines of a fence as they stand: sybil dedents its lexemes, but a table may have a margin."""
    opening, *lines, _closing = document.text[fence.start : fence.end].split("\n")
    margin = len(opening) - len(opening.lstrip())
    return "\n".join(line[margin:] for line in lines)


def run_and_compare(example: Example) -> str | None:
    """Returns what sybil is to report as the failure of this example, or None."""
    with redirect_stdout(io.StringIO()) as output:
        run_python(example)
    claimed = example.region.lexemes["claimed"]
    if claimed is None:
        return None
    expected, printed = without_trailing_space(claimed), without_trailing_space(output.getvalue())
    # `.` matches no newline, which keeps every `...` on its own line.
    if re.fullmatch(".*".join(map(re.escape, expected.split("..."))), printed):
        return None
    difference = difflib.ndiff(expected.split("\n"), printed.split("\n"))
    return "The document says (-), the block printed (+):\n" + "\n".join(difference)


def without_trailing_space(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.rstrip().split("\n"))


pytest_collect_file = Sybil(parsers=[parse_python_blocks], patterns=DOCUMENTS).pytest()
