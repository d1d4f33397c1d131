"""The parts of `scripts/bench.py`: the work, the systems that do it, the figures."""
