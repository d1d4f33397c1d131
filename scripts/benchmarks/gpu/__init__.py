"""Benchmarks that need a GPU (`scripts/bench.py gpu`), one row at a time, each in its own process."""
