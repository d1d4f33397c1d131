"""The devices that JAX has, and what is said where an expected GPU is not among them."""

import ctypes
import functools
import importlib.util
import logging

import jax

from jaxinfer.errors import ConfigError

log = logging.getLogger(__name__)
PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
"""JAX's packages for NVIDIA GPUs."""
DRIVER = "libcuda.so.1"
"""Library that comes with NVIDIA's driver."""


def visible_devices() -> list[jax.Device]:
    """Return JAX's devices; say once if they are CPUs although JAX's package for NVIDIA GPUs is installed.

    Raises:
        ConfigError: JAX has no device of the platforms that JAX_PLATFORMS names.
    """
    wanted = jax.config.jax_platforms
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second is JAX's for a plugin that does not start
        reason = f"{error}".partition("\n")[0] or "its plugin did not start"
        raise ConfigError(
            f"JAX finds no device of JAX_PLATFORMS={wanted!r} ({reason}; {_driver()}); leave it unset to use what is "
            "there"
        ) from error
    if found[0].platform == "cpu" and not wanted and any(map(_installed, PLUGINS)):
        _say_no_gpu()
    return found


@functools.cache
def _say_no_gpu() -> None:
    log.warning(
        "JAX finds no NVIDIA GPU (%s), so the model runs on the CPU. A container needs --gpus all. JAX_PLATFORMS=cpu "
        "asks for the CPU.",
        _driver(),
    )


def _driver() -> str:
    """Return in words whether NVIDIA's driver is there."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return f"{DRIVER} of NVIDIA's driver cannot be loaded"
    return f"{DRIVER} of NVIDIA's driver is there; JAX's log says why it is not used"


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # nor is jax_plugins
        return False
