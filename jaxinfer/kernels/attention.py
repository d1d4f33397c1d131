"""Which implementation of attention serves a mesh. Each has `decode` and `prefill`, which write and attend."""

import importlib
import importlib.util
import logging
from types import ModuleType

from jax.sharding import Mesh

from jaxinfer.errors import ConfigError

log = logging.getLogger(__name__)

MODULES = {"xla": "jaxinfer.kernels.xla_attention"}
"""Name -> module, imported when it is chosen."""
AUTO = "auto"


def choose(asked: str, mesh: Mesh) -> str:
    """The implementation for the devices of a mesh.

    Raises:
        ConfigError: an implementation that is not known.
    """
    if asked != AUTO and asked not in MODULES:
        raise ConfigError(f"attention_kernel must be {AUTO}, {' or '.join(MODULES)}, got {asked!r}")
    return "xla" if asked == AUTO else asked


def implementation(name: str) -> ModuleType:
    """The module of a name that `choose` gave."""
    return importlib.import_module(MODULES[name])
