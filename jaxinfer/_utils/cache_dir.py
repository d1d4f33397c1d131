"""Cache folders for reproducible files. These hold code that will be executed: compiled programs and kernels."""

import logging
import os
import stat
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

WRITABLE = stat.S_IWGRP | stat.S_IWOTH
"""Mode bits that let other users write."""


def cache_folder(name: str) -> Path:
    """Return this user's cache folder `name`, creating it if needed, under XDG_CACHE_HOME or ~/.cache.

    If that is not writable, or other users can write to it, a temporary folder is returned.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path("~/.cache").expanduser()) / "jaxinfer" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _keep_group_out(folder)
        if is_private(folder):
            return folder
        log.warning("%s is not used, as other users can write to it; set its mode to 700, or delete it", folder)
    except (OSError, RuntimeError):
        pass  # read-only, or no home directory
    folder = _temporary() / name
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def is_private(path: Path) -> bool:
    """Return whether a file or folder exists and only this user or root can have written to it."""
    if os.name != "posix":  # there access is governed by ACLs of the user's folders, not by modes
        return path.exists()
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & WRITABLE


def _keep_group_out(folder: Path) -> None:
    """Remove group write permission, which a umask of 002 gives, from a folder of this user."""
    status = folder.stat()
    if os.name == "posix" and status.st_uid == os.getuid() and status.st_mode & WRITABLE == stat.S_IWGRP:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~stat.S_IWGRP)


@cache
def _temporary() -> Path:
    """Return a private folder for temporary files, the same one for the whole process.

    Its usual name is predictable, so another user may have created it first; then a new one is used until the process
    ends.
    """
    if os.name == "posix":
        folder = Path(tempfile.gettempdir()) / f"jaxinfer-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
        except OSError as error:
            log.warning("%s cannot be used: %s; using a new folder for this process", folder, error)
        else:
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & WRITABLE:
                return folder
            log.warning(
                "%s is not used: it is a link, belongs to another user, or others can write to it; compiled code goes "
                "to a new folder, which is deleted when this process ends. Delete it, or set XDG_CACHE_HOME",
                folder,
            )
    return Path(_kept().name)


@cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    """Create a folder that is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="jaxinfer-", ignore_cleanup_errors=True)
