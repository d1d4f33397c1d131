"""Measure what replicating modules costs a decode step on virtual devices of one processor (`bench.py placement`).

Virtual devices compute replicated modules once each and communicate through the same memory. The ratios therefore show
the work that a placement adds, not the cost of links between real devices.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks import steptime
from benchmarks.steptime import Step
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding.collectives import DECODE

PLACEMENTS: Mapping[str, Mapping[str, str]] = {
    "sharded": {},
    "attention_replicated": {"*.attention": "replicate"},
    "mlp_replicated": {"*.mlp": "replicate"},
    "replicated": {"*": "replicate"},
}


def measure(hf: Mapping[str, Any], devices: int, rows: int, context: int, repeats: int) -> dict[str, float]:
    """Measure a greedy decode step under each placement: milliseconds, and the ratio to the fully sharded placement."""
    steptime.devices(devices)
    model = steptime.Model(hf, make_mesh(devices))
    variants = {name: (hf, placement) for name, placement in PLACEMENTS.items()}
    found = steptime.measure(model, variants, Step(DECODE, rows, context), repeats)
    figures = {f"step_ms@{name}": 1e3 * median(seconds) for name, seconds in found.items()}
    rounds = {name: [own / base for own, base in zip(seconds, found["sharded"])] for name, seconds in found.items()}
    return figures | {f"over_sharded@{name}": median(ratios) for name, ratios in rounds.items() if name != "sharded"}
