"""Limits of what a checkpoint's files may ask for: compared before anything is read or built."""

LARGEST_FILE = 1 << 26
"""Bytes of one JSON file. The index of the largest models takes a few million."""

LARGEST_COUNT = 1 << 28
"""No width or vocabulary comes near it; far above it PyTorch could not even describe a tensor."""

MOST_LAYERS = 1 << 12
MOST_HEADS = 1 << 14

LARGEST_TEMPLATE = 1 << 17
"""Characters of all chat templates of a checkpoint together. The longest in use have some 30,000."""

MOST_TEMPLATES = 1 << 6
MOST_TEMPLATE_TOKENS = 1 << 14
"""Words and signs of one template: Jinja compiles some 10,000 a second."""

MOST_TEMPLATE_STEPS = 1 << 22
"""Steps of one run of a template (a pass of a loop, a call, a filter, a comparison): a conversation takes some hundreds
per message."""

MOST_TEMPLATE_CHARACTERS = 1 << 27
"""Characters that all operations of one run may write, and that a single one may ask for."""

LARGEST_TEMPLATE_OUTPUT = 1 << 24
"""Characters of a rendered conversation, and of a list or mapping in it, written out: some four million tokens."""

LONGEST_RENDERING = 10.0
"""Seconds of one run, compared at each step; a single operation is bounded by what it works on."""

LARGEST_INTEGER = 1 << 16
"""Bits of an integer that a template calculates with."""

MOST_ADDED_TOKENS = 1 << 18
"""Tokens added beside tokenizer.json. Models that speak add one for each of some 65,000 sounds."""

LONGEST_TOKEN = 1 << 14
"""Characters of one token; those of long runs of spaces have 256."""

LARGEST_GROWTH = 1 << 12
"""Times that a tokenizer's rules, one after the other, may lengthen a text or what a token is decoded to."""
