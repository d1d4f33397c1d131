"""Lazy imports from transformers."""

import importlib
import logging
from typing import Any


def from_transformers(name: str) -> Any | None:
    """Import a name from transformers; None if the installed version does not have it.

    Silences the warning that torch is not installed: nothing imported here needs torch.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return getattr(importlib.import_module("transformers"), name, None)
    finally:
        logging.disable(disabled)
