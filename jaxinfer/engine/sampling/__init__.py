"""Sampler and its per-row parameters."""
