"""Recordings of an engine's steps as values: events, owners of blocks, timelines, and plots of them."""
