"""Sizes of the engine: what fits in memory, and what that allows."""
