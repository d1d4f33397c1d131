"""Tune the tiles of Triton kernels (`scripts/tune.py`)."""
