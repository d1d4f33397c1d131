"""Benchmark jaxinfer, optionally against peers on the same work in the same run, and profile its steps.

    python scripts/bench.py --work W1 W2 W3 W4 W5 --peer openvino --openvino-python /path/to/python/with/openvino-genai
    python scripts/bench.py throughput --peer hf --peer hf-cb --peer-python /path/to/python/with/torch
    python scripts/bench.py latency --batch-size 8 --input-len 128 --output-len 64
    python scripts/bench.py serving --concurrency 8 32 128 --scale 1.0 --json
    python scripts/bench.py host
    python scripts/bench.py startup
    python scripts/bench.py soak --minutes 10
    python scripts/bench.py deterministic W2 W3 W5
    python scripts/bench.py roofline W1 W2
    python scripts/bench.py profile --steps 16 --out trace
    python scripts/bench.py placement --num-hidden-layers 4
    python scripts/bench.py growth --plot growth.png
    python scripts/bench.py sharing --small
    python scripts/bench.py projections kda --m 1 64 4096 --h100
    python scripts/bench.py cross --peer hf --peer-python /path/to/python/with/torch
    python scripts/bench.py gpu --out results
    python scripts/bench.py compiled
    python scripts/bench.py families

Without `--model`, a random Llama of 0.25 B parameters is written once and used by all systems.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
