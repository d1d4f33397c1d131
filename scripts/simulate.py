"""Replay a trace of requests through the real scheduler and cache with a model of the device's step times.

    python scripts/simulate.py --trace FILE --model DIR --device h100                    # a GPU that one does not have
    python scripts/simulate.py --trace FILE --model DIR --device h100 --tensor-parallel-size 4 --max-num-seqs 512
    python scripts/simulate.py --model DIR --measure times.json --set max_num_seqs=8      # step times of this machine
    python scripts/simulate.py --trace FILE --model DIR --step-times times.json --check --set max_num_seqs=8

Throughput, latencies, hit rates of the prefix cache and preemptions follow from the engine's own decisions: only the
device is replaced. With `--device` only config.json of the model is read. docs/simulation.md gives the formats of
traces, the model of step times and its measured error.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulating import arguments

if __name__ == "__main__":
    if (devices := arguments.simulated_devices(sys.argv)) > 0:
        # A simulated mesh has virtual CPU devices; a GPU of this machine is not touched.
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    from simulating.cli import main

    sys.exit(main())
