"""Qwen3-VL model family."""
