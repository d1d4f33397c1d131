"""Settings of a deterministic engine: its single step size, and settings that contradict it."""

import logging
from dataclasses import replace

import jax.numpy as jnp

from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.functional import Program
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.matmul import choose as matmul

log = logging.getLogger(__name__)

NATIVE_TOKENS, XLA_TOKENS, GPU_TOKENS = 128, 32, 256
"""Tokens of the one step, by default. Native operations skip padding, XLA's compute it; on a GPU a step of this many
takes about as long as reading the weights."""
COST = "0.87 to 0.92 x the throughput of the default steps by processor time, measured with AVX-512 (docs/rl.md)"
"""Cost where all operations are native, measured with `scripts/bench.py deterministic`."""
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_exclude_nondeterministic_ops": True}
"""XLA options of a deterministic engine's programs on a GPU. Autotuning times candidates, and may choose another one in
each process; without it XLA takes a fixed one. The second option leaves out operations whose order of additions is not
fixed."""


def settings(config: EngineConfig, program: Program) -> EngineConfig:
    """Return the settings with the size of the one step, and log what it costs.

    Raises:
        ConfigError: a setting contradicts `deterministic`.
    """
    for name, sizes in (("decode_buckets", config.decode_buckets), ("prefill_buckets", config.prefill_buckets)):
        if sizes is not None:
            raise ConfigError(
                f"{name} is {list(sizes)}, but deterministic=True computes prefill and decode in one program of "
                "max_num_batched_tokens tokens; remove it, and set max_num_batched_tokens for another size"
            )
    gpu = program.mesh.devices.flat[0].platform != "cpu"
    native = _skips_padding(config, program)
    default = GPU_TOKENS if gpu else NATIVE_TOKENS if native else XLA_TOKENS
    tokens = config.max_num_batched_tokens or max(default, config.max_num_seqs or 0)
    log.info(
        "deterministic: prefill and decode in one program of %d tokens, %s (python scripts/bench.py deterministic "
        "measures it here); the bits are the same on this model of processor with these versions of jaxinfer and jax",
        tokens,
        COST if native else "whose cost on these devices and kernels is not known",
    )
    options = GPU_OPTIONS | dict(config.compiler_options or {}) if gpu else config.compiler_options
    return replace(config, max_num_batched_tokens=tokens, compiler_options=options)


def _skips_padding(config: EngineConfig, program: Program) -> bool:
    """Return whether attention and products are native, which skip a step's padding."""
    if program.kernel != attention.NATIVE or matmul.choose(config.matmul_kernel, program.mesh) != matmul.NATIVE:
        return False
    if program.dtype == jnp.bfloat16:
        return not matmul.cpu_has_matrix_units()
    return program.dtype == jnp.float32
