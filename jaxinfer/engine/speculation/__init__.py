"""Speculative decoding: tokens drafted on the host, and verified by the model several at a time."""
