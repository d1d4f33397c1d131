"""Structured output: bit masks of the tokens that a grammar allows next.

They are computed on the host while the device works.
"""
