"""What `scripts/generate.py` is made of."""
