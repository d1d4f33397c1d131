"""JAX's persistent compilation cache, by default in the user's cache folder."""

import logging
import tempfile
from functools import cache
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxinfer._utils.cache_dir import cache_folder

log = logging.getLogger(__name__)

AUTO = "auto"
LEAST_SECONDS = 0.1
"""Programs that compile faster are not cached: reading them takes as long. JAX's default would skip small steps."""
JAX_LEAST_SECONDS = 1.0
"""JAX's default for that limit."""


def enable(setting: str | None) -> None:
    """Enable the persistent compilation cache for the whole process; settings the user made in JAX are kept.

    Args:
        setting: a folder; "auto" for the user's cache folder, unless JAX already has one; None to leave JAX's settings.
    """
    configured = jax.config.jax_compilation_cache_dir
    if setting is None or not jax.config.jax_enable_compilation_cache:
        return
    if setting == AUTO and configured:
        _log_once(configured)
        return
    try:
        folder = cache_folder("xla") if setting == AUTO else Path(setting).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning("compiled programs are not cached: %s; set compilation_cache_dir to a writable folder", error)
        return
    if configured != str(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if jax.config.jax_persistent_cache_min_compile_time_secs == JAX_LEAST_SECONDS:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
        compilation_cache.reset_cache()  # JAX reads the setting only once
    _log_once(str(folder))


@cache
def _log_once(folder: str) -> None:
    log.info("compiled programs are cached in %s; it may be deleted at any time", folder)
