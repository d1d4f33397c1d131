"""Parts of `scripts/bench.py`: workloads, measured systems, and figures."""
