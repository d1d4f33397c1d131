"""Parts of `scripts/fuzz.py`: one module for each kind of file, and what they share."""
