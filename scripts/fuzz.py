#!/usr/bin/env python
"""Feed broken files of checkpoints to what reads them: only public errors may come out, in bounded time.

    python scripts/fuzz.py --seconds 30
    python scripts/fuzz.py --part config --seed 7 --case 123    # one input again, as a report names it

Every input is made from a number, so a run with the same seed makes the same inputs in the same order.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from fuzzing.cli import main

if __name__ == "__main__":
    sys.exit(main())
