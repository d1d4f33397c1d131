"""What `scripts/placement.py` is made of."""
