"""Building the CPU kernels with the machine's compiler."""

import subprocess
from pathlib import Path

import pytest

from jaxinfer.kernels.native import build


def test_an_interrupted_build_ends_its_compilers(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexec sleep 600\n")
    compiler.chmod(0o755)
    runs, interrupts = [], iter([KeyboardInterrupt])

    class Run(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            runs.append(self)

        def communicate(self, *args):
            for interrupt in interrupts:
                raise interrupt
            return super().communicate(*args)

    monkeypatch.setattr(subprocess, "Popen", Run)
    with pytest.raises(KeyboardInterrupt):
        build._build(str(compiler), Path(build.__file__).parent, tmp_path / "lib" / "kernels.so")
    assert len(runs) == len(build.SOURCES) and all(run.returncode is not None for run in runs)
    assert not list((tmp_path / "lib").iterdir())


def compiler_that(tmp_path, does):
    """Return the path of a compiler that runs these shell commands with `$out`, the path to write to."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nout=$2\n{does}\n')
    compiler.chmod(0o755)
    return str(compiler)


def test_a_build_moves_the_whole_library_to_its_path(tmp_path):
    library = tmp_path / "lib" / "kernels.so"
    compiler = compiler_that(tmp_path, 'echo "a warning" >&2; echo made > "$out"')
    build._build(compiler, Path(build.__file__).parent, library)
    assert library.read_text() == "made\n" and [*library.parent.iterdir()] == [library]


def test_a_failed_build_keeps_the_compilers_message(tmp_path):
    compiler = compiler_that(tmp_path, 'echo "ffi.h: no such file" >&2; exit 1')
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build._build(compiler, Path(build.__file__).parent, tmp_path / "lib" / "kernels.so")
    assert caught.value.stderr == "ffi.h: no such file\n"
    assert not list((tmp_path / "lib").iterdir())
