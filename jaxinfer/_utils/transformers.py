"""Names of transformers, imported when they are first needed."""

import importlib
import logging
from typing import Any


def from_transformers(name: str) -> Any | None:
    """Import a name from transformers; None where its version has none.

    Its warning that torch is not installed is silenced: nothing that is imported here needs torch.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return getattr(importlib.import_module("transformers"), name, None)
    finally:
        logging.disable(disabled)
