"""Speed beside the peers, measured pair by pair in one process: `python -m benchmarks`."""

import os

# PyTorch's profiler, which counts the memory of training steps, is else heard whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
