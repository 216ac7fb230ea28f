"""Limits of what a checkpoint's files may ask for: compared before anything is read or built."""

LARGEST_FILE = 1 << 26
"""Bytes of one file of text or tokens: vocabularies of a quarter of a million tokens take 35 million."""

LARGEST_DOCUMENT = 1 << 24
"""Bytes of a JSON file that is read whole, as Python's objects, which take up to twenty times as many. The index of the
largest models takes a few million."""

LARGEST_SHARD = 1 << 42
"""Bytes of one file of weights, which is mapped and not read: twice those of the largest models in all."""

LARGEST_COUNT = 1 << 28
"""No width or vocabulary comes near it; far above it PyTorch could not even describe a tensor."""

MOST_LAYERS = 1 << 8
"""Of a stack. The largest models have 130; each layer takes a few milliseconds and 0.2 MiB to build without weights."""

MOST_PARAMETERS = 1 << 43
"""Of a model, as its sizes alone tell: ten times those of the largest."""

MOST_BUCKETS = 1 << 12
"""Of distances in a relative bias. Published models have 32."""

MOST_LISTED = 50
"""Names that an error lists; the others it counts."""

MOST_HEADS = 1 << 14

WIDEST_HEAD = 1 << 11
"""Published models have 576 at most. A block of 2,048 rotary angles of this width takes 16 MiB."""

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
