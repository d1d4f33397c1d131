"""Adapters of `LLM` to other libraries, each of which must be installed beside this package."""
