"""What is kept is code that will run, so no other user may have put it there."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from jaxinfer._utils import cache_dir
from jaxinfer._utils.cache_dir import cache_folder, is_private
from jaxinfer.kernels.native import build, library

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes and owners are POSIX's")


@pytest.fixture
def usual(tmp_path, monkeypatch):
    """The folder among the temporary files that serves where the user's cache folder cannot be made."""
    blocked, temporary = tmp_path / "file", tmp_path / "tmp"
    blocked.write_text("")
    temporary.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for cached in (cache_dir._temporary, cache_dir._kept):
        cached.cache_clear()
    yield temporary / f"jaxinfer-{os.getuid()}"
    for cached in (cache_dir._temporary, cache_dir._kept):
        cached.cache_clear()


def of_another(monkeypatch, path: Path) -> None:
    """Have the system say that a path belongs to another user than this one and root."""
    for name in ("stat", "lstat"):
        real = getattr(Path, name)

        def told(self, *args, real=real, **kwargs):
            status = real(self, *args, **kwargs)
            if self != path:
                return status
            return os.stat_result((*status[:4], os.getuid() + 1, *status[5:10]))

        monkeypatch.setattr(Path, name, told)


def test_without_a_cache_folder_the_usual_temporary_one_serves_again_and_again(usual):
    assert cache_folder("native") == usual / "native" and is_private(usual / "native")
    cache_dir._temporary.cache_clear()
    assert cache_folder("xla") == usual / "xla"


@pytest.mark.parametrize("planted", ["link", "file", "group", "others", "owner"])
def test_a_temporary_folder_that_somebody_else_may_have_made_is_not_used(usual, planted, monkeypatch, caplog):
    if planted == "link":
        (usual.parent / "elsewhere").mkdir(mode=0o700)
        usual.symlink_to(usual.parent / "elsewhere")
    elif planted == "file":
        usual.write_text("")
    else:
        usual.mkdir()
        usual.chmod({"group": 0o720, "others": 0o702, "owner": 0o700}[planted])
    if planted == "owner":
        of_another(monkeypatch, usual)
    folder = cache_folder("native")
    assert folder.parent != usual and folder.parent.parent == usual.parent and is_private(folder.parent)
    assert cache_folder("xla").parent == folder.parent
    assert str(usual) in caplog.text


@pytest.mark.parametrize("planted", ["others", "owner"])
def test_a_cache_folder_others_can_write_is_not_used(usual, tmp_path, planted, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder("native")
    assert folder == tmp_path / "jaxinfer" / "native"
    if planted == "owner":
        of_another(monkeypatch, folder)
    else:
        folder.chmod(0o777)
    assert cache_folder("native") == usual / "native" and str(folder) in caplog.text


def test_a_cache_folder_made_under_a_umask_of_002_is_kept_from_the_group(usual, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "jaxinfer" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o775)
    assert cache_folder("native") == folder and folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("planted", [None, "group", "others", "owner"])
def test_a_library_others_can_have_written_is_built_anew(tmp_path, planted, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []

    def compile(compiler: str, flags: Sequence[str], include: str, path: Path) -> None:
        built.append(path)
        path.write_bytes(b"")
        path.chmod(0o755)

    monkeypatch.setattr(library, "build", compile)
    path = build._built("true")
    if planted == "owner":
        of_another(monkeypatch, path)
    elif planted:
        path.chmod({"group": 0o775, "others": 0o757}[planted])
    assert build._built("true") == path
    assert len(built) == (2 if planted else 1)
