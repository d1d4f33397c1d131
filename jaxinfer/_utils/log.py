"""Warnings logged once per process."""

import logging
from functools import cache

log = logging.getLogger("jaxinfer")


@cache
def warn_once(what: str, reason: str) -> None:
    """Warn that something runs slower than it could, with the reason."""
    log.warning("%s: %s", what, reason)
