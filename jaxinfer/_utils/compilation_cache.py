"""JAX's persistent compilation cache, in the user's cache folder unless the user keeps it elsewhere or not at all."""

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
"""Programs that compile faster are not kept: reading them takes as long. JAX's own limit is above a small step."""
JAX_LEAST_SECONDS = 1.0
"""JAX's own limit, where the user set none."""


def enable(setting: str | None) -> None:
    """Keeps what is compiled from here on, for the whole process; what the user told JAX stands.

    Args:
        setting: a folder; "auto": the user's cache folder, unless JAX has one already; None: JAX's settings stay.
    """
    configured = jax.config.jax_compilation_cache_dir
    if setting is None or not jax.config.jax_enable_compilation_cache:
        return
    if setting == AUTO and configured:
        _say(configured)
        return
    try:
        folder = cache_folder("xla") if setting == AUTO else Path(setting).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning(
            "compiled programs are not kept: %s; set compilation_cache_dir to a folder that can be written", error
        )
        return
    if configured != str(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if jax.config.jax_persistent_cache_min_compile_time_secs == JAX_LEAST_SECONDS:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
        compilation_cache.reset_cache()  # JAX looks at the setting once
    _say(str(folder))


@cache
def _say(folder: str) -> None:
    log.info("compiled programs are kept in %s; it may be deleted at any time", folder)
