"""Measure tile sizes of the Triton kernels on this GPU, and write a table that jaxinfer reads.

    python scripts/tune.py --out tiles                         # common layers; then JAXINFER_TUNED_TILES=tiles
    python scripts/tune.py --out tiles --model DIR --tensor-parallel-size 2
    python scripts/tune.py --compile-only                      # registers, spills, shared memory; needs no GPU

Shapes that the table has are left out, so that an interrupted run goes on (`--force` measures them again).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tuning.cli import main

if __name__ == "__main__":
    sys.exit(main())
