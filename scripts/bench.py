"""Throughput, latency and serving figures of jaxinfer, beside those of peers on the same work in the same run.

    python scripts/bench.py throughput --peer hf --peer hf-cb --peer-python /path/to/python/with/torch
    python scripts/bench.py latency --batch-size 8 --input-len 128 --output-len 64
    python scripts/bench.py serving --concurrency 8 32 128 --scale 1.0 --json

Without `--model` a random Llama of 0.25 B parameters is written once and used by all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
