"""Benchmarks against other libraries, measured in turn in one process: `python -m benchmarks`."""

import logging
import os

# PyTorch's profiler, which counts the memory of training steps, else logs each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# torchao logs each of its parts for other machines that it cannot load.
logging.getLogger("torchao").setLevel(logging.ERROR)
