"""Parts of `scripts/train_demo.py`: the training text, and a module for each architecture."""
