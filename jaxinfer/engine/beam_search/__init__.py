"""Beam search over the engine's sequences."""
