"""Where jaxinfer keeps what it can make again. All of it is code that will run: compiled programs and kernels."""

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
    """Return the folder `name` of this user, under XDG_CACHE_HOME, by default ~/.cache; it is made if it is missing.

    Where neither can be written, or where another user could write into it, a folder for temporary files is taken.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path("~/.cache").expanduser()) / "jaxinfer" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _keep_group_out(folder)
        if is_private(folder):
            return folder
        log.warning(
            "%s is not used, as other users can write into it; make it your own with mode 700, or delete it", folder
        )
    except (OSError, RuntimeError):
        pass  # read-only, or there is no home
    folder = _temporary() / name
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def is_private(path: Path) -> bool:
    """Return whether a file or folder exists and only this user, or root, can have written to it."""
    if os.name != "posix":  # there the rights of the user's folders say so, and no mode does
        return path.exists()
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & WRITABLE


def _keep_group_out(folder: Path) -> None:
    """Take away the group's right to write into a folder of this user, which a umask of 002 gave."""
    status = folder.stat()
    if os.name == "posix" and status.st_uid == os.getuid() and status.st_mode & WRITABLE == stat.S_IWGRP:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~stat.S_IWGRP)


@cache
def _temporary() -> Path:
    """Return a folder among the temporary files that is this user's alone, the same one for the whole process.

    Its usual name can be guessed, and everybody can make it first. Where somebody did, a new one serves until the
    process ends.
    """
    if os.name == "posix":
        folder = Path(tempfile.gettempdir()) / f"jaxinfer-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
        except OSError as error:
            log.warning("%s cannot be used: %s; a new folder is made for this process", folder, error)
        else:
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & WRITABLE:
                return folder
            log.warning(
                "%s is not used: it is a link, belongs to another user, or others can write into it; a new folder is "
                "made for "
                "this process, and what is compiled is lost at its end. Delete it, or set XDG_CACHE_HOME",
                folder,
            )
    return Path(_kept().name)


@cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="jaxinfer-", ignore_cleanup_errors=True)
