"""Print the sharding plan of a model from its config.json alone, or measure which placement is the fastest (`--tune`).

    python scripts/placement.py --model DIR --tensor-parallel-size 8
    python scripts/placement.py --model DIR --tensor-parallel-size 8 --placement '*.attention=replicate' --memory 80GiB
    python scripts/placement.py --model DIR --mesh data=2 model=4 --json
    python scripts/placement.py --model DIR --tensor-parallel-size 8 --html plan.html
    python scripts/placement.py --model DIR --tune --batch-sizes 1 8 64 --tensor-parallel-size 8
    python scripts/placement.py --model DIR --tune --tensor-parallel-size 8 --devices 8    # virtual ones, on a CPU

Only config.json is read; `--tune` uses random weights.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if "--tune" not in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a plan needs no device, and must not take a GPU's memory

from placements.cli import main

if __name__ == "__main__":
    sys.exit(main())
