"""Parts of `scripts/placement.py`."""
