"""Parts of `scripts/generate.py`."""
