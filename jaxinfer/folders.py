"""Where jaxinfer keeps what it can make again."""

import os
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` for this user: under XDG_CACHE_HOME, by default ~/.cache; it need not exist yet.

    Where neither can be written it lies in the folder for temporary files.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path("~/.cache").expanduser()
    folder = root / "jaxinfer" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        folder = Path(tempfile.gettempdir()) / f"jaxinfer-{os.getuid()}" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
