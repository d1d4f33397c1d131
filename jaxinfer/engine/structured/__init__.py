"""Structured output: what a grammar allows next, as bit masks computed on the host while the device works."""
