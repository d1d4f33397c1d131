#!/usr/bin/env python
"""Fuzz the readers of checkpoint files: a broken file may only raise public errors, in bounded time.

    python scripts/fuzz.py --seconds 30
    python scripts/fuzz.py --part config --seed 7 --case 123  # one input again

Inputs are generated from the seed, so runs with the same seed produce the same inputs in the same order.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from fuzzing.cli import main

if __name__ == "__main__":
    sys.exit(main())
