"""Mamba-2's recurrence on NVIDIA GPUs: prefill, prefill token by token and decode as Triton kernels.

The kernels are in `kernels/triton/triton_scan.py`; `triton_rows` says why the loops are inside of them. Queries and
keys are read by group, and nothing is kept in memory but the outputs.
"""

from functools import partial
from typing import Any

import jax

from jaxinfer.kernels.state.ssd import Tokens
from jaxinfer.kernels.state.triton_rows import PRECISION, SIZE, Launcher, like, operands, over_rows, over_segments
from jaxinfer.kernels.triton.triton_launch import Options, Target

SCAN, STEPS = Options(8, 2), Options(4, 2)
"""Warps and pipeline stages of each kernel; estimated, not measured. With 4 warps `scan` spills where heads have 80
columns or 256 keys."""


def _launch(
    kernel: Any,
    options: Options,
    tokens: Tokens,
    states: jax.Array,
    runs: jax.Array,
    target: Target,
    **more: Any,
) -> tuple[jax.Array, jax.Array]:
    found = Launcher.of(states, target).launch(
        kernel,
        options,
        dict(segments=runs, **operands(tokens), states=states),
        dict(out=like(tokens.v)),
        rows=runs.shape[0],
        G=tokens.k.shape[1],
        **more,
    )
    return found["out"], found["new_states"]


def _scan(tokens: Tokens, states: jax.Array, runs: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    from jaxinfer.kernels.triton import triton_scan  # imports triton

    return _launch(triton_scan.scan, SCAN, tokens, states, runs, target, SIZE=SIZE, PRECISION=PRECISION)


def _steps(tokens: Tokens, states: jax.Array, runs: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    from jaxinfer.kernels.triton import triton_scan  # imports triton

    return _launch(triton_scan.scan_steps, STEPS, tokens, states, runs, target)


prefill = partial(over_segments, _scan)
"""Runs of tokens of several sequences, as `ssd.prefill`."""
prefill_steps = partial(over_segments, _steps)
"""Runs of tokens, one at a time, as `ssd.prefill_steps`."""
decode = partial(over_rows, _steps)
"""One token per sequence, as `ssd.decode`."""
