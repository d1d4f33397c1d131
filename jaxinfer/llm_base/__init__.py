"""Base classes of `LLM`: its lifecycle, the requests of a call, and methods for people who train."""
