"""Limits of what a checkpoint's files may ask for: compared before anything is read or built."""

LARGEST_FILE = 1 << 26
"""Bytes of one JSON file. The index of the largest models takes a few million."""

LARGEST_COUNT = 1 << 28
"""No width or vocabulary comes near it; far above it PyTorch could not even describe a tensor."""

MOST_LAYERS = 1 << 12
MOST_HEADS = 1 << 14
