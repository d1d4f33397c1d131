"""Handshake: check that all processes have the same settings, versions, files, shapes and weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib

from jaxinfer.checkpoint import manifest
from jaxinfer.checkpoint.gguf_folder import open_weights
from jaxinfer.config import EngineConfig
from jaxinfer.distributed.group import Group
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.errors import ConfigError
from jaxinfer.sharding.policy import Placement

OWN = ("compilation_cache_dir", "log_interval")
"""Settings that may differ between processes."""


def share_config(
    group: Group, config: EngineConfig, overrides: Mapping[str, Any] | None
) -> tuple[EngineConfig, Mapping[str, Any] | None]:
    """Return process 0's settings and `hf_overrides` in every process, after checking that all run the same versions.

    Raises:
        ConfigError: the overrides cannot be sent.
        DistributedError: versions or devices differ, or a process is gone.
    """
    device = jax.local_devices()[0]
    group.check_equal(
        {
            "jaxinfer's sources (sha256)": _sources(),
            "jax's version": jax.__version__,
            "jaxlib's version": jaxlib.__version__,
            "flax's version": flax.__version__,
            "its kind of device": f"{device.platform} {device.device_kind}",
            "its number of devices": jax.local_device_count(),
        }
    )
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    values["placement"] = dict(Placement.of(config.placement).patterns)
    if config.speculative_config is not None:
        values["speculative_config"] = asdict(config.speculative_config)
    if config.compiler_options is not None:
        values["compiler_options"] = dict(config.compiler_options)
    try:
        mine = json.loads(json.dumps([values, None if overrides is None else dict(overrides)]))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"hf_overrides must be plain JSON where several processes serve a model: {error}") from error
    values, overrides = group.all_gather(mine)[0]
    return replace(EngineConfig(**values), **{name: getattr(config, name) for name in OWN}), overrides


def _sources() -> str:
    """Return a digest of the package's source files: a working tree has no other version."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for ending in ("*.py", "*.cc", "*.h") for path in root.rglob(ending)):
        found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def check_checkpoint(group: Group, directory: Path) -> None:
    """Check that all processes have the same checkpoint: the whole config.json, and the first bytes of each tensor.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        DistributedError: another process has a different checkpoint.
    """
    if (directory / manifest.NAME).is_file():
        weights = manifest.file_digest(directory / manifest.NAME)
    else:
        with open_weights(directory) as reader:
            weights = manifest.fingerprint(reader)
    config = directory / "config.json"
    group.check_equal(
        {
            "its config.json (sha256)": manifest.file_digest(config)[:16] if config.is_file() else None,
            "its model's tensors (sha256)": weights[:16],
        }
    )


def check_programs(group: Group, runner: Runner) -> None:
    """Check that all processes compile the same steps over the same weights.

    Raises:
        DistributedError: they do not; the message names what differs.
    """
    program = runner.program
    shapes = json.loads(json.dumps(asdict(runner.shapes)))
    group.check_equal(
        shapes
        | {
            "its mesh": str(program.mesh.device_ids.tolist()),
            "its dtype": str(program.dtype),
            "its kv_cache_dtype": program.kv_cache_dtype,
            "its attention kernel": f"{program.kernel}, tiles of {program.tile}",
            "its parameters": [f"{p.dtype}{list(p.shape)} {p.sharding.spec}" for p in runner.params],
        }
    )
    group.check_equal({"its weights that are whole on every device (checksum)": checksum(runner.params)})


def checksum(params: Sequence[jax.Array]) -> int:
    """Return a checksum of this process's copies of the replicated parameters; it depends on their order."""
    own = [p.addressable_data(0) for p in params if p.is_fully_replicated]
    return sum(map(int, _sums(own))) % (1 << 64) if own else 0


@jax.jit
def _sums(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Return a uint32 checksum of each array's bits and their positions."""
    return [_sum(array) * jnp.uint32(2 * i + 1) for i, array in enumerate(arrays)]


def _sum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * min(array.dtype.itemsize, 4)}").astype(jnp.uint32).reshape(-1)
    place = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) + jnp.uint32(1)
    return (bits * (place | 1)).sum(dtype=jnp.uint32)
