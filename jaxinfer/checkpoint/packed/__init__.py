"""Quantised formats of published checkpoints: what config.json declares, and readers that dequantise their weights."""
