"""Measure which modules to replicate (`placement.py --tune`), on the target devices, with a model of a few layers.

A kind of module (`layers.*.attention`) is measured by the change that replicating it makes to a whole step, so that its
communication and XLA's fusion with neighbouring modules are included. The duration of one layer comes from steps with
one layer more; it extrapolates the few layers to the whole model.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from benchmarks.steptime import Model, Step, in_turns, runner

from jaxinfer.sharding import Plan
from jaxinfer.sharding.collectives import ENCODE
from jaxinfer.sharding.policy import REPLICATE, any_layer
from placements.tuned import Kind, Timing, Tuned

FEW = 2
"""Number of layers of the measured model."""
LAYERS = "num_hidden_layers"
MOST_KINDS = 12
"""Maximum number of kinds; all of their subsets are evaluated."""


def tune(
    hf: Mapping[str, Any],
    model: Callable[[Mapping[str, Any]], Model],
    plan: Callable[..., Plan],
    steps: Sequence[Step],
    repeats: int,
) -> Tuned:
    """Measure every kind of module and choose a placement.

    Args:
        hf: contents of config.json.
        model: makes a model with random weights from a config.json.
        plan: makes a plan from a config.json and a placement.
        steps: steps to measure.
        repeats: passes of each step.
    """
    few, fewer = shortened(hf, FEW), shortened(hf, FEW - 1)
    made = model(few)
    found = kinds(plan, hf, few)
    deep, shallow = plan(hf, {}), plan(few, {})
    timings = [
        _timing(made, few, fewer, found, step, depth(deep, step.kind) - depth(shallow, step.kind), repeats)
        for step in steps
    ]
    tokens = max((step.size * step.context for step in steps if step.kind != ENCODE), default=1)
    proposal, chosen, fits = choose(found, timings, lambda placement: plan(hf, placement), tokens)
    return Tuned(
        chosen.devices,
        found,
        tuple(timings),
        proposal,
        chosen,
        fits,
        tokens,
        _confirm(made, few, proposal, steps, repeats) if proposal else {},
    )


def shortened(hf: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return the config.json with at most `layers` layers in each of its parts."""
    short = {
        name: shortened(value, layers) if name.endswith("_config") and isinstance(value, Mapping) else value
        for name, value in hf.items()
    }
    if isinstance(short.get(LAYERS), int):
        short[LAYERS] = min(short[LAYERS], layers)
    return short


def depth(plan: Plan, step: str) -> int:
    """Return the number of layers that a step runs."""
    modules = {row.module for row in plan.rows if step in row.steps}
    return max(Counter(any_layer(path) for path in modules).values(), default=0)


def kinds(plan: Callable[..., Plan], hf: Mapping[str, Any], few: Mapping[str, Any]) -> tuple[Kind, ...]:
    """Return the kinds of modules that sharding divides."""
    sharded, whole, measured = plan(hf, {}), plan(hf, {"*": REPLICATE}), plan(few, {})
    sizes = [Counter(), Counter()]
    for size, made in zip(sizes, (sharded, whole), strict=True):
        for row in made.rows:
            size[any_layer(row.module)] += row.device_bytes
    counts = [Counter(any_layer(path) for path in {row.module for row in made.rows}) for made in (sharded, measured)]
    steps = {any_layer(row.module): row.steps for row in sharded.rows}
    return tuple(
        Kind(pattern, steps[pattern], counts[0][pattern], counts[1][pattern], own, sizes[1][pattern])
        for pattern, own in sizes[0].items()
        if own != sizes[1][pattern]
    )


def _timing(
    model: Model,
    few: Mapping[str, Any],
    fewer: Mapping[str, Any],
    found: Sequence[Kind],
    step: Step,
    missing: int,
    repeats: int,
) -> Timing:
    """Measure a step; `missing` is the number of layers that the measured model lacks of the whole one."""
    own = [kind for kind in found if step.kind in kind.steps]
    variants = {"sharded": (few, {}), "fewer": (fewer, {})}
    variants |= {kind.pattern: (few, {kind.pattern: REPLICATE}) for kind in own}
    runs = {name: runner(*model.program(hf, placement), step) for name, (hf, placement) in variants.items()}
    passes = {name: np.array(seconds) for name, seconds in in_turns(runs, repeats).items()}
    base = median(passes["sharded"])
    layer = max(0.0, median(passes["sharded"] - passes["fewer"]))
    saved = {k.pattern: agreed(passes["sharded"] - passes[k.pattern]) * k.count / k.measured for k in own}
    return Timing(step, base + missing * layer, saved)


def agreed(differences: np.ndarray) -> float:
    """Return the median, or 0 if fewer than three quarters of the passes have its sign."""
    low, middle, high = np.percentile(differences, (25, 50, 75))
    return float(middle) if low > 0 or high < 0 else 0.0


def choose(
    found: Sequence[Kind], timings: Sequence[Timing], plan: Callable[[Mapping[str, str]], Plan], tokens: int
) -> tuple[tuple[str, ...], Plan, bool]:
    """Choose the kinds to replicate; return them, the plan, and whether it fits in memory.

    The choice has the smallest mean, over the steps, of the duration relative to all sharded, among the placements
    whose cache holds `tokens` tokens beside the weights. If there is none, everything is sharded.
    """
    worth = [kind.pattern for kind in found if any(timing.saved.get(kind.pattern, 0.0) > 0 for timing in timings)]
    if len(worth) > MOST_KINDS:
        raise ValueError(f"the model has {len(worth)} kinds of modules to choose from, more than {MOST_KINDS}")
    subsets = [subset for size in range(len(worth) + 1) for subset in itertools.combinations(worth, size)]

    def cost(subset: Sequence[str]) -> float:
        return sum(timing.ratio(subset) for timing in timings)

    for subset in sorted(subsets, key=lambda subset: (round(cost(subset), 6), len(subset))):
        made = plan(dict.fromkeys(subset, REPLICATE))
        if made.tokens is None or made.tokens >= tokens:
            return subset, made, True
    return (), plan({}), False


def _confirm(
    model: Model, few: Mapping[str, Any], proposal: Sequence[str], steps: Sequence[Step], repeats: int
) -> dict[str, float]:
    placement, found = dict.fromkeys(proposal, REPLICATE), {}
    for step in steps:
        runs = {name: runner(*model.program(few, p), step) for name, p in (("sharded", {}), ("proposal", placement))}
        passes = {name: np.array(seconds) for name, seconds in in_turns(runs, repeats).items()}
        found[str(step)] = median(passes["proposal"] / passes["sharded"])
    return found
