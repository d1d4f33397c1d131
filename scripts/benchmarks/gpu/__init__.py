"""`scripts/bench.py gpu`: every figure a GPU is needed for, row by row, each in a process of its own."""
