"""Speed beside the peers, measured pair by pair in one process: `python -m benchmarks`."""
