"""What `scripts/train_demo.py` is made of: the text, and a file for each architecture."""
