"""Limits of the files of a checkpoint, checked before a file is read or a model is built."""

MAX_FILE_BYTES = 1 << 26
"""Bytes of tokenizer.json. A vocabulary of 250,000 tokens takes 35 million."""

MAX_JSON_BYTES = 1 << 24
"""Bytes of a JSON file that is parsed into Python objects, which take up to twenty times as many. The index of the
largest models takes a few million."""

MAX_SHARD_BYTES = 1 << 42
"""Bytes of one file of weights, which is memory-mapped. The largest models have half as many in total."""

MAX_COUNT = 1 << 28
"""Upper limit of a width, a length or a vocabulary. PyTorch cannot describe a tensor far above it."""

MAX_CHECKPOINT_LAYERS = 1 << 8
"""Layers of an encoder or a decoder of a checkpoint. The largest models have 130. A layer without weights takes a few
milliseconds and 0.2 MiB to build."""

MAX_LABELS = 1 << 16
"""Classes of a classifier whose config.json does not name them."""

MAX_PARAMETERS = 1 << 43
"""Parameters of a model, computed from its sizes: ten times those of the largest models."""

MAX_BUCKETS = 1 << 12
"""Buckets of a relative position bias. Published models have 32."""

MAX_LISTED_NAMES = 50
"""Names that an error message lists; further names are counted."""

MAX_HEADS = 1 << 14
"""Attention heads of a checkpoint."""

MAX_EXPERTS = 1 << 10
"""Experts of one layer. Published models have 512 at most."""

MAX_HEAD_DIM = 1 << 11
"""Width of a head. Published models have 576 at most. A block of 2,048 rotary angles of this width takes 16 MiB."""

MAX_SOURCE_CHARACTERS = 1 << 17
"""Characters of all chat templates of a checkpoint in total. The longest published ones have about 30,000."""

MAX_TEMPLATES = 1 << 6
"""Chat templates of a checkpoint."""

MAX_SOURCE_TOKENS = 1 << 14
"""Tokens of Jinja in one template. Jinja compiles about 10,000 per second."""

MAX_RENDER_STEPS = 1 << 22
"""Steps of one run of a template (an iteration of a loop, a call, a filter, a comparison). A conversation takes a few
hundred per message."""

MAX_RENDER_CHARACTERS = 1 << 27
"""Characters that all operations of one run write in total, and upper limit of a single operation."""

MAX_OUTPUT_CHARACTERS = 1 << 24
"""Characters of a rendered conversation, and of a list or mapping of a template: about four million tokens."""

MAX_RENDER_SECONDS = 10.0
"""Seconds of one run, checked at each step. The size of its operands limits the time of a single operation."""

MAX_INTEGER_BITS = 1 << 16
"""Bits of an integer in a template."""

MAX_ADDED_TOKENS = 1 << 18
"""Added tokens that are not in tokenizer.json. Speech models add about 65,000 audio tokens."""

MAX_TOKEN_CHARACTERS = 1 << 14
"""Characters of one token. Tokens of spaces have up to 256."""

MAX_TEXT_GROWTH = 1 << 12
"""Factor by which all rules of a tokenizer in sequence can lengthen a text or a decoded token."""
