"""Base classes of `LLM`: lifecycle, requests of a call, scoring, transcription, weights for trainers, and plots."""
