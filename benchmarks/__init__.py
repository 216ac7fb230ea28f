"""Benchmarks against other libraries, measured in turn in one process: `python -m benchmarks`."""

import os

# PyTorch's profiler, which counts the memory of training steps, else logs each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
