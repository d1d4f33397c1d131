"""Base classes of `LLM`: its lifecycle, the requests of a call, methods for people who train, and pictures."""
